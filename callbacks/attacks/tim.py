"""TIM: momentum on smoothed gradients."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Keep
from .mim import MIM
from .prepare import BNMode
from .transforms import Smoothing


class TIM(MIM):
    """Translation-invariant attack with momentum, TI-MI-FGSM (Dong et al. 2019, arXiv 1904.02884).

    :class:`MIM` with :class:`Smoothing`: the gradient is convolved with a Gaussian before it is accumulated. Cost: ``steps``
    forward and backward passes, and one more forward pass with ``keep="best"``.

    Args:
        kernel_size: side of the kernel in pixels, odd; it spans three standard deviations to either side. Images of 32 pixels
            want less than the default, which is for 224 to 299.
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
        kernel_size: int = 15,
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
            transforms=[Smoothing(kernel_size)],
            norm=norm,
            targeted=targeted,
            objective=objective,
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
