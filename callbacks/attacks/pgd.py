"""PGD: projected gradient ascent on the loss."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import Attack, ObjectiveName
from .checks import DEFAULT_EPS, Number, RandomStart, check_step_size
from .prepare import BNMode
from .problem import Problem


class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083) under linf, l2 or l1.

    Each step goes ``step_size`` along the steepest direction of the norm and back into ball and box. The last iterate is
    returned. Cost: ``steps`` forward and backward passes; objective ``kl`` adds one forward pass for the clean prediction,
    and each restart one to judge it.

    Args:
        step_size: length of a step in the norm; None takes 2.5 * eps / steps, Madry's rule (2/255 for 10 steps at 8/255).
        steps: number of steps.
        eps: see :class:`Attack`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        norm: Norm = "linf",
        random_start: RandomStart = True,
        restarts: int = 1,
        targeted: bool = False,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            norm=norm,
            random_start=random_start,
            restarts=restarts,
            targeted=targeted,
            objective=objective,
            bn_mode=bn_mode,
            seed=seed,
        )
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps} must be a whole number of at least 1")
        self.step_size = check_step_size(step_size)
        self.steps = steps

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        step = 2.5 * problem.eps / self.steps if self.step_size is None else self.step_size
        x_adv = problem.random_start(self.random_start)
        for _ in range(self.steps):
            x_adv = problem.project(x_adv + step * problem.steepest(problem.gradient(x_adv)))
        return x_adv
