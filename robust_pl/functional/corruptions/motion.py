"""Streaks along a line: what motion leaves of a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-9


def streak_taps(radius: float, sigma: float) -> list[float]:
    """Weights along the streak, one side of a Gaussian from its middle on, of sum 1; what is negligible is cut off."""
    taps = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * math.ceil(radius) + 1)]
    taps = [tap for tap in taps if tap > _NEGLIGIBLE]
    return [tap / sum(taps) for tap in taps]


def streaked(x: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """Blur each image along its own direction; the border is repeated.

    Reconstructed after ImageMagick's motion blur, whose shape it has: one side of a Gaussian, in steps of whole pixels.

    Args:
        x: images (B, C, H, W).
        angle: directions in degrees (B,): 0 takes what lies to the right, 90 what lies below.
        radius: the streak is cut off after twice as many pixels.
        sigma: standard deviation in pixels.
    """
    b, c, h, w = x.shape
    radians = (angle * (math.pi / 180)).view(-1, 1, 1)
    row, column = torch.arange(h, device=x.device).view(1, -1, 1), torch.arange(w, device=x.device).view(1, 1, -1)
    flat, total = x.flatten(2), torch.zeros_like(x)
    for i, tap in enumerate(streak_taps(radius, sigma)):
        down, right = ((i * part - 0.5).ceil().long() for part in (radians.sin(), radians.cos()))
        place = (row + down).clamp(0, h - 1) * w + (column + right).clamp(0, w - 1)
        total += tap * flat.gather(2, place.view(b, 1, -1).expand(-1, c, -1)).view_as(x)
    return total
