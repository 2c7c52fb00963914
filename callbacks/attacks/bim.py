"""BIM: the basic iterative method."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Iterative, Keep
from .prepare import BNMode


class BIM(Iterative):
    """Basic iterative method, I-FGSM (Kurakin et al. 2017, arXiv 1607.02533): steps from x itself.

    Cost: ``steps`` forward and backward passes, and one more forward pass with ``keep="best"``.

    Args:
        step_size: length of a step in the norm; None takes eps / steps.
        steps: number of steps.
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
            bn_mode=bn_mode,
            seed=seed,
        )
