"""NES: signed steps along a gradient estimated from scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...functional.geometry import Norm
from .checks import DEFAULT_EPS, Number, check_step_size, choose
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, QueryObjective, Search, always


class NES(QueryAttack):
    """NES attack with scores (Ilyas et al. 2018, arXiv 1804.08598): ascent along a gradient estimated by natural evolution.

    Each iteration asks for the loss at x + sigma * u and x - sigma * u for ``directions`` Gaussian u with an expected length
    of about one, adds up the differences times u, and steps: its sign for linf, its direction for l2. As in public codes the
    probes may leave ball and box by up to about sigma (in l2). There is no momentum, and the step does not shrink as the
    paper's does.

    Cost: one forward pass at x, and 2 * ``directions`` + 1 an iteration, as often as ``n_queries`` allows and until the first
    success. The one more is the look whether the new image is a success, which published figures leave out. No backward pass.

    Args:
        step_size: length of a step in the norm; None takes eps / 4 for linf (2/255 at 8/255) and 0.06 * eps for l2, the
            ratios of public settings.
        directions: pairs of probes an iteration, at least 1. Public settings: 15 to 50 for linf, 5 or 15 for l2.
        sigma: length of u in pixels; public settings go from 2.55/255 on CIFAR to 0.1 on ImageNet.
        n_queries: most queries of a sample, at least 1.
        eps: see :class:`Attack`, and so all others.
        norm: ``linf`` or ``l2``.
        objective: ``margin``, or ``ce`` as published, which is flat where the network is sure.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        directions: int = 20,
        sigma: Number = 0.01,
        *,
        norm: Norm = "linf",
        n_queries: int = 10000,
        targeted: bool = False,
        objective: QueryObjective = "margin",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("norm", norm, ("linf", "l2"))
        if not isinstance(directions, int) or directions < 1:
            raise ValueError(f"directions={directions} must be a whole number of at least 1, such as 20")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma={sigma} must be above 0, such as 2.55/255")
        super().__init__(
            eps, n_queries=n_queries, norm=norm, targeted=targeted, objective=objective, bn_mode=bn_mode, seed=seed
        )
        self.step_size = check_step_size(step_size)
        self.directions, self.sigma = directions, sigma

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        search = Search(problem, x, self.n_queries)
        while search.goes_on(2 * self.directions + 1):
            part, x_adv = search.problem, search.x_best
            step = part.eps * (0.25 if self.norm == "linf" else 0.06) if self.step_size is None else self.step_size
            gradient = self.estimate(search)
            search.offer(part.project(x_adv + step * part.steepest(gradient)), always)
        return search.result()

    def estimate(self, search: Search) -> Tensor:
        """The gradient at ``search.x_best`` up to a factor, (n, C, H, W)."""
        x_adv, gradient = search.x_best, torch.zeros_like(search.x_best)
        for _ in range(self.directions):
            u = search.problem.draws.normal(x_adv) / math.sqrt(x_adv[0].numel())
            ahead, behind = search.ask(torch.cat([x_adv + self.sigma * u, x_adv - self.sigma * u]))
            gradient += (ahead - behind).view(-1, 1, 1, 1) * u
        return gradient
