"""AugMix's operations, and its mixture of chains of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import pil
from .augmentations import Augmentation
from .hashing import integers, uniform
from .mixed_chains import MixedChains

_TABLES = ["autocontrast", "equalize", "posterize", "solarize"]
_MOVES = ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
_BLENDS = ["color", "contrast", "brightness", "sharpness"]
OPERATIONS = [*_TABLES, *_MOVES]
ALL_OPERATIONS = [*OPERATIONS, *_BLENDS]
_CHOICE, _LEVEL, _SIGN = 0, 1, 2


class AugMixOperation(Augmentation):
    """One operation on each image, drawn from AugMix's nine (Hendrycks et al. 2020, arXiv 1912.02781), as Pillow does it.

    With a level ~ U(0.1, severity) they are: autocontrast, equalize, posterize to ``4 - int(0.4 level)`` bits, solarize from
    ``256 - int(25.6 level)``, turns by ``int(3 level)`` degrees, shears by ``0.03 level`` along the upper or left edge, and
    moves by ``int(level * size / 30)`` pixels, each way half of the time. What geometry leaves empty is black, and it
    interpolates linearly. The authors move by a fraction of a size that is a constant of their code; here it is the image's.

    Pixels are rounded to 8 bits first, and so are results; a whole batch costs one lookup and one resampling.

    Args:
        severity: the largest level, in [0.1, 10]; the authors take 3 on CIFAR and 1 on ImageNet.
        all_ops: also color, contrast, brightness and sharpness, whose factor is ``0.1 + 0.18 level``. They are among the
            corruptions of CIFAR-C and ImageNet-C, so results with them do not compare.

    Raises:
        ValueError: if the severity is out of range; if images with other than 1 or 3 channels meet ``all_ops``.
    """

    def __init__(self, severity: float = 3.0, all_ops: bool = False) -> None:
        if not 0.1 <= severity <= 10:
            raise ValueError(f"severity={severity} must lie in [0.1, 10]")
        self.severity, self.all_ops = severity, all_ops

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        chosen = integers(keys, _CHOICE, len(ALL_OPERATIONS if self.all_ops else OPERATIONS))
        level = 0.1 + (self.severity - 0.1) * uniform(keys, _LEVEL)
        sign = 1 - 2 * integers(keys, _SIGN, 2)
        levels = operate(pil.to_levels(x), chosen, level, sign)
        if self.all_ops:
            levels = _blended(levels, chosen, level)
        return (levels / 255).to(x.dtype), y


class AugMixChains(MixedChains):
    """AugMix (Hendrycks et al. 2020, arXiv 1912.02781) without its loss: mixed chains of :class:`AugMixOperation`.

    For the consistency loss train with :class:`robust_pl.methods.AugMix`, which takes two such versions of each image.

    Args:
        severity: see :class:`AugMixOperation`; 3 on CIFAR, 1 on ImageNet.
        width: chains; 3 are the authors', EasyRobust takes 5.
        depth: operations in each; None draws 1, 2 or 3.
        alpha: of the mixing distributions.
        all_ops: also operations that corruption benchmarks hold.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, severity: float = 3.0, width: int = 3, depth: int | None = None, alpha: float = 1.0, all_ops: bool = False
    ) -> None:
        super().__init__([AugMixOperation(severity, all_ops)], width, depth, alpha)


def operate(levels: Tensor, chosen: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """One operation on each image.

    Args:
        levels: whole numbers from 0 to 255, float32 (B, C, H, W).
        chosen: position in ``ALL_OPERATIONS``, int64 (B,); one that is not in ``OPERATIONS`` changes nothing.
        level: strength in [0.1, 10], (B,).
        sign: direction, -1 or 1, (B,).
    """
    counts = pil.histogram(levels)
    tables = (
        pil.autocontrast(counts),
        pil.equalize(counts),
        pil.posterize(4 - (level * 4 / 10).long()),
        pil.solarize(256 - (level * 256 / 10).long()),
    )
    table = torch.arange(256, device=levels.device).float()
    for name, one in zip(_TABLES, tables, strict=True):
        table = torch.where(_is(chosen, name).view(-1, 1, 1), one, table)
    height, width = levels.shape[2:]
    moved = pil.affine(levels, _matrix(chosen, level, sign, height, width))
    moves = ((chosen >= len(_TABLES)) & (chosen < len(OPERATIONS))).view(-1, 1, 1, 1)
    return torch.where(moves, moved, pil.apply_table(levels, table.expand(-1, levels.shape[1], -1)))


def _matrix(chosen: Tensor, level: Tensor, sign: Tensor, height: int, width: int) -> Tensor:
    """Where each image's pixels come from, (B, 2, 3)."""
    degrees = sign * (level * 30 / 10).long() * _is(chosen, "rotate")
    matrix = pil.rotation(degrees.double(), height, width)
    matrix[:, 0, 1] += sign * level * 0.3 / 10 * _is(chosen, "shear_x")
    matrix[:, 1, 0] += sign * level * 0.3 / 10 * _is(chosen, "shear_y")
    matrix[:, 0, 2] += sign * (level * (width / 3) / 10).long() * _is(chosen, "translate_x")
    matrix[:, 1, 2] += sign * (level * (height / 3) / 10).long() * _is(chosen, "translate_y")
    return matrix


def _blended(levels: Tensor, chosen: Tensor, level: Tensor) -> Tensor:
    """The operations that blend an image with its grey, flat, black or smooth version."""
    if levels.shape[1] not in (1, 3):
        raise ValueError(f"all_ops=True needs images with 1 or 3 channels, not {levels.shape[1]}: set it to False")
    others = (pil.grey(levels), pil.mean_grey(levels), levels.new_zeros(()), pil.smooth(levels))
    other = levels
    for name, one in zip(_BLENDS, others, strict=True):
        other = torch.where(_is(chosen, name).view(-1, 1, 1, 1), one, other)
    return pil.blend(other, levels, 0.1 + level * 1.8 / 10)


def _is(chosen: Tensor, name: str) -> Tensor:
    return chosen == ALL_OPERATIONS.index(name)
