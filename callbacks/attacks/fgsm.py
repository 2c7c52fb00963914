"""FGSM: one step along the gradient."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import Attack, ObjectiveName
from .checks import DEFAULT_EPS, Number, RandomStart, check_step_size
from .prepare import BNMode
from .problem import Problem


class FGSM(Attack):
    """Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572).

    With ``random_start=True`` it is the single step of fast adversarial training (Wong et al. 2020, arXiv 2001.03994), which
    uses ``step_size=10/255`` for ``eps=8/255``. Cost: one forward and one backward pass.

    Args:
        step_size: length of the step; None takes eps.
        eps: see :class:`Attack`, and so all others.
    """

    takes_start = True

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        *,
        norm: Norm = "linf",
        random_start: RandomStart = False,
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
        self.step_size = check_step_size(step_size)

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        start = problem.random_start(self.random_start)
        step = problem.eps if self.step_size is None else self.step_size
        gradient = problem.gradient(start.clamp(0.0, 1.0))  # a given start may lie outside of the box
        return problem.project(start + step * problem.steepest(gradient))
