"""MIM: steps along accumulated gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Iterative, Keep, Memory
from .prepare import BNMode
from .problem import Problem
from .transforms import Transform


class MIM(Iterative):
    """Momentum iterative method, MI-FGSM (Dong et al. 2018, arXiv 1710.06081); starts at x.

    The gradient is divided by the mean of its absolute values, as public codes do (the paper divides by their sum, which
    differs by a constant factor), and added to ``decay`` times the sum so far. With ``transforms`` it becomes any of the
    combinations of the literature, DTS-MI for one. Cost: ``steps`` forward and backward passes, times the copies that the
    transforms make; ``keep="best"`` adds one forward pass, or ``steps + 1`` where the transforms change the inputs.

    Args:
        step_size: length of a step in the norm; None takes eps / steps.
        steps: number of steps.
        decay: how much of the earlier gradients is kept, 0 switches the momentum off.
        transforms: of inputs and gradients, in the order in which they are applied: :class:`ScaleCopies`,
            :class:`DiverseInputs`, :class:`Smoothing`.
        keep: which iterate to return, ``last``, ``best`` or ``first``, see :class:`Iterative`.
        eps: see :class:`Attack`, and so all others.
    """

    reach = 1.0

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        decay: float = 1.0,
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
            norm=norm,
            targeted=targeted,
            objective=objective,
            keep=keep,
            transforms=transforms,
            bn_mode=bn_mode,
            seed=seed,
        )
        if not 0 <= decay < float("inf"):
            raise ValueError(f"decay={decay} must be a finite number of at least 0; 0 switches the momentum off")
        self.decay = decay

    def direction(self, problem: Problem, x_adv: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        gradient, logits = self.gradient(problem, x_adv)
        return self.accumulate(gradient, memory), logits

    def accumulate(self, gradient: Tensor, memory: Memory) -> Tensor:
        """The momentum (B, C, H, W) once ``gradient`` is added to it."""
        mean = gradient.flatten(1).abs().mean(1).view(-1, 1, 1, 1)
        momentum = gradient / torch.where(mean > 0, mean, 1.0)
        if "momentum" in memory:
            momentum = self.decay * memory["momentum"] + momentum
        memory["momentum"] = momentum
        return momentum
