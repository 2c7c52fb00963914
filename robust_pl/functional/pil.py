"""Pillow's operations on whole batches of images, each with arguments of its own, in Pillow's 8-bit arithmetic.

Images are ``levels``: float32 (B, C, H, W) that holds whole numbers from 0 to 255. What changes each level by itself is a table
(B, C, 256) of the new ones, so that any mix of such operations over a batch is one lookup.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY = (19595, 38470, 7471)  # of 65536, as in Pillow's conversion to "L"
_ROUNDING = 0.01  # float32 coordinates put what is a whole level just below it, and Pillow cuts fractions off


def to_levels(x: Tensor) -> Tensor:
    """Levels of pixels in [0, 1], to the nearest."""
    return (x.float() * 255).round().clamp(0, 255)


def histogram(levels: Tensor) -> Tensor:
    """How often each level occurs in each channel, int64 (B, C, 256)."""
    at = levels.long().flatten(2)
    return at.new_zeros((*levels.shape[:2], 256)).scatter_add_(2, at, torch.ones_like(at))


def apply_table(levels: Tensor, table: Tensor) -> Tensor:
    """Each level replaced by the one that the table (B, C, 256) holds for it."""
    return table.gather(2, levels.long().flatten(2)).view_as(levels)


def autocontrast(counts: Tensor) -> Tensor:
    """Table that stretches each channel to 0 ... 255, from its histogram; a channel of one level stays as it is."""
    place = torch.arange(256, device=counts.device)
    low = torch.where(counts > 0, place, 255).amin(2, keepdim=True)
    high = torch.where(counts > 0, place, 0).amax(2, keepdim=True)
    span = (high - low).double()
    scale = torch.full_like(span, 255) / span  # a number divided by a tensor would be its reciprocal, rounded, times 255
    table = (place * scale - low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, table, place.double()).float()


def equalize(counts: Tensor) -> Tensor:
    """Table that makes each channel's histogram flat; a channel of one level stays as it is."""
    place = torch.arange(256, device=counts.device)
    high = torch.where(counts > 0, place, 0).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, high)) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp_min(1)).clamp(0, 255)
    return torch.where(step > 0, table, place).float()


def posterize(bits: Tensor) -> Tensor:
    """Table (B, 1, 256) that keeps the first ``bits``, int64 (B,) in 0 ... 8, of each level."""
    dropped = 2 ** (8 - bits).view(-1, 1, 1)
    return (torch.arange(256, device=bits.device) // dropped * dropped).float()


def solarize(threshold: Tensor) -> Tensor:
    """Table (B, 1, 256) that inverts the levels from ``threshold``, (B,), on."""
    place = torch.arange(256, device=threshold.device)
    return torch.where(place < threshold.view(-1, 1, 1), place, 255 - place).float()


def affine(levels: Tensor, matrix: Tensor) -> Tensor:
    """Images resampled linearly, black where the place that a pixel comes from lies outside.

    Args:
        levels: (B, C, H, W).
        matrix: (B, 2, 3), maps (column, row, 1) of a pixel's middle, in pixels, to where its colour is taken from.
    """
    height, width = levels.shape[2:]
    column = torch.arange(width, device=levels.device).float() + 0.5
    row = torch.arange(height, device=levels.device).float().unsqueeze(1) + 0.5
    across, down = matrix.float().view(-1, 2, 3, 1, 1).unbind(1)
    u = across[:, 0] * column + across[:, 1] * row + across[:, 2]
    v = down[:, 0] * column + down[:, 1] * row + down[:, 2]
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    grid = torch.stack([2 * u / width - 1, 2 * v / height - 1], 3)
    out = F.grid_sample(levels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside.unsqueeze(1), (out + _ROUNDING).floor(), 0)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Matrix (B, 2, 3) for :func:`affine` that turns images counter-clockwise round their middle; ``degrees`` (B,)."""
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    x, y = width / 2, height / 2
    across = torch.stack([cos, -sin, x - cos * x + sin * y], 1)
    return torch.stack([across, torch.stack([sin, cos, y - sin * x - cos * y], 1)], 1)


def blend(other: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """``other + factor * (levels - other)``, cut off to whole levels in 0 ... 255; ``factor`` (B,)."""
    return (other + factor.view(-1, 1, 1, 1).float() * (levels - other)).clamp(0, 255).floor()


def grey(levels: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of images with three channels; the channel itself of those with one."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = (weight * channel for weight, channel in zip(_GREY, levels.long().unbind(1), strict=True))
    return ((red + green + blue + 0x8000) >> 16).unsqueeze(1).float()


def mean_grey(levels: Tensor) -> Tensor:
    """The mean luma of each image to the nearest level, (B, 1, 1, 1)."""
    return (grey(levels).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()


def smooth(levels: Tensor) -> Tensor:
    """Each inner pixel's mean with its eight neighbours, itself counted five times; pixels at the edge stay as they are."""
    out = levels.clone()
    total = F.avg_pool2d(levels, 3, stride=1, divisor_override=1) + 4 * levels[..., 1:-1, 1:-1]
    out[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return out
