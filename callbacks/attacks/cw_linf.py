"""CWLinf: PGD on the margin between logits."""

from __future__ import annotations

from torch import Tensor

from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number, RandomStart
from .iterative import Iterative, Keep
from .prepare import BNMode
from .problem import Objective, Problem


class CWLinf(Iterative):
    """Margin loss of Carlini and Wagner (2017, arXiv 1608.04644) under linf, by projected gradient steps.

    Raises the largest wrong logit above the right one (or, if targeted, the target's above all others), until they differ by
    ``kappa``: beyond that the objective is flat and the sample rests. This is the "CW" column of papers on adversarial
    training. The defaults, 20 steps of 2.5 * eps / steps from a random start and kappa 50, are from memory: published values
    range from 20 to 100 steps, and from kappa 0 to 50. Cost: as :class:`PGD`.

    Args:
        step_size: length of a step; None takes 2.5 * eps / steps.
        steps: number of steps.
        kappa: confidence, the difference of logits at which a sample rests; at least 0.
        keep: which iterate to return, ``last``, ``best`` or ``first``, see :class:`Iterative`.
        eps: see :class:`Attack`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 20,
        *,
        kappa: float = 50.0,
        random_start: RandomStart = True,
        restarts: int = 1,
        targeted: bool = False,
        keep: Keep = "last",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            step_size,
            steps,
            random_start=random_start,
            restarts=restarts,
            targeted=targeted,
            objective="margin",
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
        if not 0 <= kappa < float("inf"):
            raise ValueError(f"kappa={kappa} must be a finite number of at least 0, in units of logits")
        self.kappa = kappa

    def _objective(self, problem: Problem, callers: ObjectiveName | Objective | None) -> Objective:
        margin = super()._objective(problem, callers)
        return Objective(lambda logits, *given: margin.loss(logits, *given).clamp(max=self.kappa), margin.given)
