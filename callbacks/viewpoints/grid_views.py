"""A regular grid of viewpoints around each object."""

from __future__ import annotations

import torch
from torch import Tensor

from ...scenes.view_space import ViewSpace
from ..attacks.checks import check_count
from .base import ViewpointAttack
from .distribution import ViewDistribution
from .problem import ViewProblem
from .random_views import refuse_start
from .search import Order, Searched

_EXACT = 1e-5


class GridViews(ViewpointAttack):
    """Every object from the middles of equal fields of azimuth and angle from the pole: extreme views without a search.

    The other parameters stay in the middle of their ranges. What is found is a mixture with a component at each view and next
    to no width, so that the fresh views are those of the grid, to within 0.002 degrees, in an order of their own; and accuracy,
    worst view, coverage and the evaluation folder are those of the grid. :class:`robust_pl.callbacks.ViewSphere` draws a map of
    all of the sphere instead, whatever the space.

    Cost: ``2 * azimuths * polars`` renders and forward passes for each object.

    Args:
        azimuths: fields of the range of ``theta``.
        polars: fields of the range of ``phi``.
        space: see :class:`ViewpointAttack`, and so all others; ``theta`` and ``phi`` must be active in it.

    Raises:
        ValueError: if an argument is out of its range; on attacking, if ``theta`` or ``phi`` is not active.
    """

    def __init__(
        self,
        azimuths: int = 12,
        polars: int = 7,
        *,
        space: ViewSpace | None = None,
        batch_size: int = 256,
        chunk: int = 16,
        targeted: bool = False,
        seed: int = 0,
        name: str | None = None,
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        for field, value in (("azimuths", azimuths), ("polars", polars)):
            check_count(field, value)
        super().__init__(
            space=space,
            eval_samples=azimuths * polars,
            batch_size=batch_size,
            chunk=chunk,
            targeted=targeted,
            seed=seed,
            name=name,
            every_n_epochs=every_n_epochs,
            folder=folder,
        )
        self.azimuths, self.polars = azimuths, polars

    def space_of(self, space: ViewSpace) -> ViewSpace:
        for name in ("theta", "phi"):
            if name not in space.active:
                raise ValueError(f"GridViews moves theta and phi, and {name} is not active: take another space, or RandomViews")
        return space

    def search(self, problem: ViewProblem, order: Order) -> Searched:
        refuse_start(self, order)
        theta, phi = torch.meshgrid(_middles(self.azimuths), _middles(self.polars), indexing="ij")
        mean = torch.zeros(len(problem.ids), theta.numel(), problem.space.dim, device=problem.device)
        for name, values in (("theta", theta), ("phi", phi)):
            mean[..., problem.space.active.index(name)] = values.flatten().to(mean)
        weights = torch.full_like(mean[..., 0], 1 / theta.numel())
        found = ViewDistribution(weights, mean, torch.full_like(mean, _EXACT), problem.space, problem.ids)
        return Searched(found, torch.zeros(len(problem.ids), 0, 2))


def _middles(count: int) -> Tensor:
    """Unbounded numbers of the middles of ``count`` equal fields of a range, (count,)."""
    return (2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1).atanh()
