"""DIM: momentum on gradients of images resized and padded at random."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .base import ObjectiveName
from .checks import DEFAULT_EPS, Number
from .iterative import Keep
from .mim import MIM
from .prepare import BNMode
from .transforms import DiverseInputs


class DIM(MIM):
    """Diverse inputs with momentum, M-DI2-FGSM (Xie et al. 2019, arXiv 1803.06978): :class:`MIM` with :class:`DiverseInputs`.

    Every sample draws its own transformation; public codes draw one a batch. The image is scaled back to its side, as in
    those codes (the paper keeps 330 pixels of 299). Cost: ``steps`` forward and backward passes; ``keep="best"`` adds
    ``steps + 1`` forward passes, since gradients are taken at other images.

    Args:
        resize_rate: side of the padded image over that of the image, above 1.
        prob: how often an image is changed, in [0, 1].
        decay: how much of the earlier gradients is kept; 0 switches the momentum off, which is DI2-FGSM.
        eps: see :class:`MIM`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        decay: float = 1.0,
        resize_rate: float = 1.1,
        prob: float = 0.5,
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
            transforms=[DiverseInputs(resize_rate, prob)],
            norm=norm,
            targeted=targeted,
            objective=objective,
            keep=keep,
            bn_mode=bn_mode,
            seed=seed,
        )
