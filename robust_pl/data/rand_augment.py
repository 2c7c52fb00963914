"""RandAugment."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentations import Augmentation
from .hashing import integers

_GEOMETRY = ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
_COLOUR = ["autocontrast", "equalize", "solarize", "posterize", "color", "contrast", "brightness", "sharpness"]
OPERATIONS = ["identity", *_GEOMETRY, *_COLOUR]
_SHEAR, _TRANSLATE, _ROTATE, _BLEND, _BITS = 0.3, 0.3, torch.pi / 6, 0.9, 4


class RandAugment(Augmentation):
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): ``num_ops`` operations a sample, drawn from 14 with replacement.

    At magnitude 10 an image is sheared by 0.3, moved by 0.3 of its size, turned by 30 degrees, solarized from 0, posterized to
    4 bits, or blended with its grey, flat, black or smooth version by 1.9 or 0.1; smaller ones scale down towards no change.
    Directions are drawn. What geometry leaves empty is black, and it interpolates linearly. Colours are kornia's operations,
    which are PIL's on float images. Every operation runs on the whole batch and each sample keeps its own, so that no sample
    is handled alone and no device waits.

    Args:
        num_ops: operations in a row, at least 1.
        magnitude: of all of them, in [0, 10].

    Raises:
        ValueError: if an argument is out of range.
        ImportError: without kornia.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 9.0) -> None:
        if num_ops < 1:
            raise ValueError(f"num_ops={num_ops} must be at least 1")
        if not 0 <= magnitude <= 10:
            raise ValueError(f"magnitude={magnitude} must lie in [0, 10]")
        _enhance()
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        for turn in range(self.num_ops):
            chosen = integers(keys, 2 * turn, len(OPERATIONS))
            sign = 1.0 - 2.0 * integers(keys, 2 * turn + 1, 2).to(x.dtype)
            x = self.operate(x, chosen, sign)
        return x, y

    def operate(self, x: Tensor, chosen: Tensor, sign: Tensor) -> Tensor:
        """One operation on each image.

        Args:
            x: pixels (B, C, H, W) in [0, 1].
            chosen: position in ``OPERATIONS``, int64 (B,).
            sign: direction, -1.0 or 1.0, (B,).
        """
        amount, kornia = self.magnitude / 10, _enhance()
        factor = 1 + sign * _BLEND * amount
        # Filled on the device: a number would be copied there, for which the host would wait.
        threshold, bits = x.new_full((), 1 - amount), chosen.new_full((), 8 - round(_BITS * amount))
        changed = {
            "autocontrast": _autocontrast(x),
            "equalize": kornia.equalize(x),
            "solarize": kornia.solarize(x, threshold) if amount else x,
            "posterize": kornia.posterize(x, bits),
            "color": kornia.adjust_saturation_with_gray_subtraction(x, factor) if x.shape[1] == 3 else x,
            "contrast": kornia.adjust_contrast_with_mean_subtraction(x, factor),
            "brightness": kornia.adjust_brightness_accumulative(x, factor),
            "sharpness": kornia.sharpness(x, factor),
        }
        out = torch.where(_among(chosen, _GEOMETRY), _move(x, chosen, sign * amount), x)
        for name, images in changed.items():
            out = torch.where(_among(chosen, [name]), images, out)
        return out


def _enhance() -> Any:
    """Kornia's operations, imported where they are needed: a module kept in an attribute could not be pickled."""
    try:
        from kornia import enhance
    except ImportError as error:
        raise ImportError("RandAugment needs kornia: pip install 'robust_pl[augment]'") from error
    return enhance


def _among(chosen: Tensor, names: list[str]) -> Tensor:
    """Which samples do one of these operations, bool (B, 1, 1, 1)."""
    hits = torch.zeros_like(chosen, dtype=torch.bool)
    for name in names:
        hits |= chosen == OPERATIONS.index(name)
    return hits.view(-1, 1, 1, 1)


def _autocontrast(x: Tensor) -> Tensor:
    """Each channel of each image stretched to [0, 1]; one that is all of one value stays as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-12), x)


def _move(x: Tensor, chosen: Tensor, amount: Tensor) -> Tensor:
    """Sheared, moved or turned images, all in one resampling; amounts in [-1, 1], (B,)."""
    height, width = x.shape[2:]
    shear_x, shear_y, right, down, turn = (
        torch.where(chosen == OPERATIONS.index(name), most * amount, 0.0)
        for name, most in zip(_GEOMETRY, (_SHEAR, _SHEAR, _TRANSLATE, _TRANSLATE, _ROTATE), strict=True)
    )
    # From where each pixel is taken, in coordinates in which the image reaches from -1 to 1 whatever its sides.
    theta = torch.stack(
        [
            torch.stack([turn.cos(), (shear_x - turn.sin()) * height / width, 2 * right], 1),
            torch.stack([(shear_y + turn.sin()) * width / height, turn.cos(), 2 * down], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)
