"""Amplitude-phase recombination: of pairs of images, and of two changed versions of one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..functional.recombination import recombined
from .augmentations import Augmentation, partners
from .augmix import AugMixOperation
from .hashing import hash_keys, uniform

Coin = Literal["batch", "sample"]
PairOverflow = Literal["clip", "keep"]
SingleOverflow = Literal["clip", "wrap"]
_COIN, _PARTNER, _SECOND, _WHICH = 0, 1, 2, 3
_OPERATIONS = 1_000
_ROUNDING = 1e-3  # a whole level that the transforms brought back a little below it


class APRPair(Augmentation):
    """APR-P (Chen et al. 2021, arXiv 2108.08487): an image keeps its phases and takes the amplitudes of another of the batch.

    Labels stay, since they go with phases. Only the partner, and the coin of the whole batch, depend on the batch; the partner
    is never the sample itself unless it is alone, where the authors' permutation may leave some in place. The authors' loss
    also takes the image as it was: see :class:`robust_pl.methods.APR`.

    Args:
        probability: of changing the batch, in [0, 1]; the authors take 0.6 on CIFAR, 0.5 on ImageNet, and 0.16 with FGSM.
        coin: thrown once for the ``batch``, as the authors do, or for each ``sample``.
        overflow: ``clip`` cuts off what leaves [0, 1], as data must not; ``keep`` leaves it, as the authors do and by default
            the method :class:`robust_pl.methods.APR`.

    Raises:
        ValueError: if an argument is out of range or unknown.
    """

    def __init__(self, probability: float = 0.6, coin: Coin = "batch", overflow: PairOverflow = "clip") -> None:
        _check(probability)
        if coin not in ("batch", "sample"):
            raise ValueError(f"coin={coin!r} is unknown: choose batch or sample")
        if overflow not in ("clip", "keep"):
            raise ValueError(f"overflow={overflow!r} is unknown: choose clip or keep")
        self.probability, self.coin, self.overflow = probability, coin, overflow

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self.probability == 0:
            return x, y
        out = recombined(x[partners(keys, _PARTNER)], x)
        if self.overflow == "clip":
            out = out.clamp(0, 1)
        # The least key stands for the batch, whatever the order of its samples.
        changed = uniform(keys if self.coin == "sample" else keys.amin(0, keepdim=True), _COIN) < self.probability
        return torch.where(changed.view(-1, 1, 1, 1), out, x), y


class APRSingle(Augmentation):
    """APR-S (Chen et al. 2021, arXiv 2108.08487): amplitudes and phases of an image after one operation and after two.

    AugMix's operations at severity 3 change the image once; half of the time that is all. Else a second one follows on top, and
    the result has the amplitudes of the first version and the phases of the second, or the reverse, each half of the time. It
    is cut to 8 bits. The authors do this before the random crop on CIFAR, and after it on ImageNet.

    Args:
        probability: of changing a sample, in [0, 1]; the authors take 1, and 0.9 with APR-P and FGSM.
        severity: of the operations, see :class:`AugMixOperation`.
        overflow: ``clip`` cuts off what leaves the range; ``wrap`` takes it modulo 256, as the authors' cast to 8 bits does,
            which leaves bright pixels in dark regions and dark ones in bright regions.

    Raises:
        ValueError: if an argument is out of range or unknown.
    """

    def __init__(self, probability: float = 1.0, severity: float = 3.0, overflow: SingleOverflow = "clip") -> None:
        _check(probability)
        if overflow not in ("clip", "wrap"):
            raise ValueError(f"overflow={overflow!r} is unknown: choose clip or wrap")
        self.probability, self.overflow = probability, overflow
        self.operation = AugMixOperation(severity)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        once, _ = self.operation(x, y, hash_keys(keys, _OPERATIONS))
        twice, _ = self.operation(once, y, hash_keys(keys, _OPERATIONS + 1))
        changed, second, reverse = (
            (uniform(keys, draw) < share).view(-1, 1, 1, 1)
            for draw, share in ((_COIN, self.probability), (_SECOND, 0.5), (_WHICH, 0.5))
        )
        levels = recombined(torch.where(reverse, twice, once), torch.where(reverse, once, twice)).float() * 255 + _ROUNDING
        levels = levels.trunc().remainder(256) if self.overflow == "wrap" else levels.trunc().clamp(0, 255)
        return torch.where(changed, torch.where(second, (levels / 255).to(x.dtype), once), x), y


def _check(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must lie in [0, 1]")
