"""N-FGSM's attack: one step from strong noise, without a way back into the ball."""

from __future__ import annotations

from torch import Tensor

from .base import Attack, ObjectiveName
from .checks import DEFAULT_EPS, Number, check_step_size
from .prepare import BNMode
from .problem import Problem


class NoisyFGSM(Attack):
    """The training attack of N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): noise of k * eps, then a step of eps, linf.

    x + U(-k eps, k eps) is cut to the box, and so is the end; nothing is projected onto the ball of eps, so the perturbation
    may reach (k + 1) * eps. It is for training alone: an evaluation refuses it. Cost: one forward and one backward pass.

    Args:
        eps: radius that is trained for.
        k: size of the noise in units of eps; the authors take 2, and up to 4 for large eps.
        step_size: length of the step; None takes eps.
        objective: see :class:`Attack`, and so all others.

    Raises:
        ValueError: if k is negative.
    """

    is_random = True
    takes_start = True

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        k: float = 2.0,
        step_size: Number | None = None,
        *,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, objective=objective, bn_mode=bn_mode, seed=seed)
        if k < 0:
            raise ValueError(f"k={k} is the size of the noise in units of eps: it must be at least 0")
        self.k, self.step_size = k, check_step_size(step_size)

    @property
    def stays_within(self) -> float:
        """Noise and step together, in units of eps."""
        return float("inf") if self.step_size is not None else self.k + 1

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        start = problem.given_start
        if start is None:
            start = x + self.k * problem.eps * (2 * problem.draws.uniform(x) - 1)
        start = start.clamp(0.0, 1.0)
        step = problem.eps if self.step_size is None else self.step_size
        return (start + step * problem.gradient(start).sign()).clamp(0.0, 1.0)
