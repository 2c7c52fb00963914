"""Training on natural views."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...data.hashing import uniform
from ...scenes.natural import USUAL_ELEVATION, natural_space
from ...scenes.view_space import Range, ViewSpace
from ..base import OptimizerFactory
from ..schedules import Schedule
from .rendered_views import RenderedViews


class NaturalViewTraining(RenderedViews):
    """Upright views from usual elevations: the ``natural`` baseline of VIAT (Ruan et al. 2023, arXiv 2307.10235).

    See :func:`robust_pl.scenes.natural.natural_space`. The authors take elevations for each class, which their release leaves
    out; here they are one range for all. Costs and errors are those of :class:`RenderedViews`.

    Args:
        elevation: lowest and highest, in degrees above the horizon.
        net: see :class:`RenderedViews`, and so all others.
    """

    def __init__(
        self,
        net: nn.Module,
        elevation: Range = USUAL_ELEVATION,
        renders: int = 16,
        views_per_object: int = 0,
        space: ViewSpace | None = None,
        seed: int | None = None,
        normalize_renders: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(
            net, renders, views_per_object, space, seed, normalize_renders, optimizer, schedule, weights, num_classes
        )
        natural_space(ViewSpace(), elevation)  # refuses elevations that are none
        self.elevation = (elevation[0], elevation[1])

    def sample_views(self, which: Tensor, keys: Tensor) -> Tensor:
        return natural_views(self._space, keys, self.elevation)


def natural_views(space: ViewSpace, keys: Tensor, elevation: Range = USUAL_ELEVATION) -> Tensor:
    """Viewpoints (M, 6) as photographers choose them, distance and shifts in ``space``, drawn from keys (M,)."""
    natural = natural_space(space, elevation)
    return natural.uniform(uniform(keys.unsqueeze(1), torch.arange(natural.dim)))
