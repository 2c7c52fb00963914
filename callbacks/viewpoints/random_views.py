"""Random viewpoints, and the worst of many random ones: the baselines of a search."""

from __future__ import annotations

import torch

from ...scenes.view_space import ViewSpace
from .base import ViewpointAttack
from .distribution import UniformViews, ViewDistribution
from .problem import ViewProblem
from .search import Order, Searched


class RandomViews(ViewpointAttack):
    """Views spread uniformly over the space; or random search: of ``samples`` such views the ``keep`` worst.

    Random search returns a mixture of Gaussians of one size around the views that it kept, so that its fresh views are subject
    to the same noise as those of :class:`ViewFool`, with which it may be compared at equal renders: ``samples`` = 5100. With a
    tiny ``sigma`` and ``eval_samples`` = ``keep`` they are the kept views themselves.

    Cost: ``samples`` renders and forward passes for each object, and ``eval_samples``, and ``keep``.

    Args:
        samples: views to search among; 0 for none, where the uniform distribution alone is wanted.
        keep: how many to keep; None keeps the uniform distribution, and ``samples`` look for the worst view alone.
        sigma: standard deviation of u around each view that is kept.
        space: see :class:`ViewpointAttack`, and so all others.
    """

    def __init__(
        self,
        samples: int = 0,
        keep: int | None = None,
        sigma: float = 0.1,
        *,
        space: ViewSpace | None = None,
        eval_samples: int = 100,
        batch_size: int = 256,
        chunk: int = 16,
        targeted: bool = False,
        seed: int = 0,
        name: str | None = None,
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        super().__init__(
            space=space,
            eval_samples=eval_samples,
            batch_size=batch_size,
            chunk=chunk,
            targeted=targeted,
            seed=seed,
            name=name,
            every_n_epochs=every_n_epochs,
            folder=folder,
        )
        if samples < 0:
            raise ValueError(f"samples={samples} must be at least 0")
        if keep is not None and not 1 <= keep <= samples:
            raise ValueError(f"keep={keep} views of samples={samples} cannot be kept: choose keep from [1, samples]")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma={sigma} must be above 0, such as 0.1, or 1e-4 for the kept views themselves")
        self.samples, self.keep, self.sigma = samples, keep, sigma

    def search(self, problem: ViewProblem, order: Order) -> Searched:
        refuse_start(self, order)
        everywhere = UniformViews(problem.space, problem.ids)
        u = everywhere.sample(self.samples, problem.draws.key)[0].to(problem.device)
        fitness = problem.fitness(u)
        history = torch.zeros(len(u), 0, 2)
        if self.samples:
            history = torch.stack([fitness.mean(1), fitness.amax(1)], 1).unsqueeze(1)
        if self.keep is None:
            return Searched(everywhere, history)
        # Stable, so that equal fitness keeps the first on every machine.
        best = fitness.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        mean = u.gather(1, best.unsqueeze(2).expand(-1, -1, u.shape[2]))
        weights = torch.full_like(mean[..., 0], 1 / self.keep)
        sigma = torch.full_like(mean, self.sigma)
        return Searched(ViewDistribution(weights, mean, sigma, problem.space, problem.ids), history)


def refuse_start(attack: ViewpointAttack, order: Order) -> None:
    """An attack that does not evolve has nothing to start from.

    Raises:
        ValueError: if it is given a start or iterations.
    """
    if order.start is not None or order.iterations is not None:
        raise ValueError(f"{type(attack).__name__} draws at random: it takes neither start nor iterations")
