"""VMIM: momentum on gradients corrected by those of the neighbourhood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional.geometry import Norm
from ...functional.perturbation import per_pixel
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Keep, Memory
from .mim import MIM
from .prepare import BNMode
from .problem import Problem
from .transforms import Transform

_AT_ONCE = 5
"""Neighbours that share a pass: enough to use the machine, few enough for its memory."""


class VMIM(MIM):
    """Variance-tuned momentum, VMI-FGSM (Wang and He 2021, arXiv 2103.15571).

    To each gradient is added how much the mean gradient of random neighbours of the *last* iterate, x_adv + U(-r, r) with
    r = ``beta`` * eps in every pixel, differed from the gradient there. Under l2 and l1, r is spread over the pixels. The
    neighbours pass through the ``transforms`` too. The neighbours of the last step, which nothing uses, are left out. Cost:
    ``steps + neighbours * (steps - 1)`` forward and backward passes, 190 by default, times the copies that the transforms
    make; ``keep="best"`` as in :class:`MIM`.

    Args:
        neighbours: how many random neighbours are looked at.
        beta: how far away they lie, in units of eps.
        eps: see :class:`MIM`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        decay: float = 1.0,
        neighbours: int = 20,
        beta: float = 1.5,
        transforms: Sequence[Transform] | None = None,
        norm: Norm = "linf",
        targeted: bool = False,
        objective: ObjectiveName | None = None,
        keep: Keep = "last",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            step_size,
            steps,
            decay=decay,
            transforms=transforms,
            norm=norm,
            targeted=targeted,
            objective=objective,
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} must be at least 1; MIM is the attack without them")
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta={beta} must be a finite number above 0")
        self.neighbours, self.beta = neighbours, beta

    @property
    def is_random(self) -> bool:
        return super().is_random or self.steps > 1

    def direction(self, problem: Problem, x_adv: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        gradient, logits = self.gradient(problem, x_adv)
        tuned = gradient
        if "point" in memory:
            tuned = gradient + self.neighbourhood(problem, memory["point"]) - memory["gradient"]
        memory["point"], memory["gradient"] = x_adv, gradient
        return self.accumulate(tuned, memory), logits

    def neighbourhood(self, problem: Problem, x_adv: Tensor) -> Tensor:
        """Mean gradient (B, C, H, W) of random neighbours of ``x_adv``."""
        radius = per_pixel(self.beta * problem.eps, x_adv, self.norm)
        total = torch.zeros_like(x_adv)
        for first in range(0, self.neighbours, _AT_ONCE):
            count = min(_AT_ONCE, self.neighbours - first)
            noise = (2 * problem.draws.uniform(x_adv) - 1 for _ in range(count))
            around = torch.cat([x_adv + radius * offset for offset in noise])
            gradient, _ = self.gradient(problem, around)
            total = total + gradient.view(count, *x_adv.shape).sum(0)
        return total / self.neighbours
