"""SIM: momentum on the mean gradient over copies of different brightness."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Keep
from .mim import MIM
from .prepare import BNMode
from .transforms import ScaleCopies


class SIM(MIM):
    """Scale-invariant attack with momentum, SI-MI-FGSM (Lin et al. 2020, arXiv 1908.06281).

    :class:`MIM` with :class:`ScaleCopies`: the gradient is the mean over x, x/2, x/4, ... Cost: ``steps * copies`` forward and
    backward passes, 50 by default; ``keep="best"`` adds ``steps + 1`` forward passes.

    Args:
        copies: number of scales.
        decay: how much of the earlier gradients is kept, 0 switches the momentum off.
        eps: see :class:`MIM`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        decay: float = 1.0,
        copies: int = 5,
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
            transforms=[ScaleCopies(copies)],
            norm=norm,
            targeted=targeted,
            objective=objective,
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
