"""Shifts and flips of batches of images, each a function of the images and their keys only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .hashing import integers


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
    rows = torch.arange(height, device=x.device) + integers(keys, 0, 2 * pixels + 1).unsqueeze(1)
    columns = torch.arange(width, device=x.device) + integers(keys, 1, 2 * pixels + 1).unsqueeze(1)
    if flip:
        columns = torch.where(integers(keys, 2, 2).bool().unsqueeze(1), columns.flip(1), columns)
    padded = F.pad(x, (pixels,) * 4, mode)
    flat = rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)
    return padded.flatten(2).gather(2, flat.view(batch, 1, -1).expand(-1, channels, -1)).view(batch, channels, height, width)


def crop_and_flip(x: Tensor, keys: Tensor) -> Tensor:
    """The usual CIFAR augmentation: padding by 4, random crop, random horizontal flip; (B, C, H, W)."""
    return shift(x, keys, pixels=4, flip=True)


def shift_by_one(x: Tensor, keys: Tensor) -> Tensor:
    """A shift by at most one pixel, for 8 x 8 digits; a mirrored digit would be another character. (B, C, H, W)."""
    return shift(x, keys, pixels=1)
