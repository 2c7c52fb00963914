"""Shifts and flips of batches of images, each a function of the images and their keys only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .hashing import uniform


def shift(x: Tensor, keys: Tensor, pixels: int, flip: bool = False, mode: str = "constant") -> Tensor:
    """Random crop after padding, i.e. a shift by up to ``pixels`` each way; perhaps a flip.

    Args:
        x: (B, C, H, W).
        keys: int64 (B,), on the same device.
        pixels: the padding on each side; offsets are uniform over ``2 * pixels + 1`` positions per axis.
        flip: also mirror left-right with probability 1/2.
        mode: what is padded with, ``constant`` for black, or another of ``torch.nn.functional.pad``.
    """
    batch, channels, height, width = x.shape
    # All draws in one go: on a GPU the time is that of starting kernels.
    draws = uniform(keys.unsqueeze(1), torch.arange(3, device=keys.device))
    offsets = (draws[:, :2] * (2 * pixels + 1)).long()
    rows = torch.arange(height, device=x.device) + offsets[:, :1]
    columns = torch.arange(width, device=x.device) + offsets[:, 1:]
    if flip:
        columns = torch.where(draws[:, 2:] >= 0.5, columns.flip(1), columns)
    padded = F.pad(x, (pixels,) * 4, mode)
    flat = rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)
    return padded.flatten(2).gather(2, flat.view(batch, 1, -1).expand(-1, channels, -1)).view(batch, channels, height, width)


def crop_and_flip(x: Tensor, keys: Tensor) -> Tensor:
    """The usual CIFAR augmentation: padding by 4, random crop, random horizontal flip; (B, C, H, W)."""
    return shift(x, keys, pixels=4, flip=True)


def shift_by_one(x: Tensor, keys: Tensor) -> Tensor:
    """A shift by at most one pixel, for 8 x 8 digits; a mirrored digit would be another character. (B, C, H, W)."""
    return shift(x, keys, pixels=1)
