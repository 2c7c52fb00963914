"""PGD: projected gradient ascent on the loss."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number, RandomStart
from .iterative import Iterative, Keep
from .prepare import BNMode


class PGD(Iterative):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083) under linf, l2 or l1.

    Each step goes ``step_size`` along the steepest direction of the norm and back into ball and box. Cost: ``steps`` forward
    and backward passes; objective ``kl`` adds one forward pass for the clean prediction, ``keep="best"`` one for the last
    iterate, and each restart one to judge it.

    Args:
        step_size: length of a step in the norm; None takes 2.5 * eps / steps, Madry's rule (2/255 for 10 steps at 8/255).
        steps: number of steps.
        keep: which iterate to return, ``last``, ``best`` or ``first``, see :class:`Iterative`.
        eps: see :class:`Attack`, and so all others.
    """

    takes_start = True

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
        keep: Keep = "last",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            step_size,
            steps,
            norm=norm,
            random_start=random_start,
            restarts=restarts,
            targeted=targeted,
            objective=objective,
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
