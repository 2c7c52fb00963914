"""Spatter: drops of water, or splashes of mud, on the lens. Pixels float64 (B, 3, H, W), multiples of 1/255."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .filters import gaussian, mean_of_9, separable

_WATER, _MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
_FARTHEST = 20
_MUD_FROM = 0.8
_SLOPE, _SUM = (-1.0, 0.0, 1.0), (1.0, 1.0, 1.0)
_TINY = 1e-6


def spatter(
    x: Tensor, draws: Draws, mean: float, deviation: float, smoothness: float, threshold: float, strength: float, mud: float
) -> Tensor:
    """Liquid where smoothed noise is above a threshold: water, lit from above, or brown mud.

    The outline of the drops, from which their light falls off, is that of the thresholded noise, where the benchmark asks an
    edge detector (reconstructed, the water is not the same file by file).
    """
    liquid = gaussian(mean + deviation * draws.normal(1, *x.shape[-2:]), smoothness)
    if mud:
        cover = gaussian((liquid > threshold).to(x.dtype), strength)
        cover = torch.where(cover < _MUD_FROM, 0.0, cover)
        return x * (1 - cover) + cover * x.new_tensor(_MUD).view(3, 1, 1)
    wet = liquid >= threshold
    light = torch.where(wet, (liquid * 255).floor(), 0.0) * _relief(wet)
    brightest = light.amax((2, 3), keepdim=True)
    light = torch.where(brightest > 0, strength * light / brightest, 0.0)
    return (x + light * x.new_tensor(_WATER).view(3, 1, 1)).clamp(0, 1)


def _relief(wet: Tensor) -> Tensor:
    """How the light falls on drops (B, 1, H, W): the slope of the distance to their outlines, seen from the upper left."""
    near = mean_of_9(distance(outline(wet), _FARTHEST))
    depth = equalized((near + _TINY).floor())
    # [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]] is the slope down, the slope to the right, and the pixel itself.
    down, right = (separable(depth, *taps, "mirror") for taps in ((_SLOPE, _SUM), (_SUM, _SLOPE)))
    return (mean_of_9((down + right + depth).clamp(0, 255)) + _TINY).round()


def outline(wet: Tensor) -> Tensor:
    """Pixels of the mask, bool (B, 1, H, W), that lie beside, above or below one outside of it."""
    around = F.pad(wet.double(), (1, 1, 1, 1), mode="replicate")
    inner = around[..., 1:-1, :-2] * around[..., 1:-1, 2:] * around[..., :-2, 1:-1] * around[..., 2:, 1:-1]
    return wet & (inner == 0)


def distance(mask: Tensor, farthest: int) -> Tensor:
    """Euclidean distance to the nearest pixel of a mask, bool (..., H, W), at most ``farthest``."""
    far = float(farthest**2)
    square = torch.where(mask, 0.0, far).double()
    for axis in (-2, -1):
        wide = F.pad(square, [0, 0, farthest, farthest] if axis == -2 else [farthest, farthest], value=far)
        square = torch.full_like(square, far)
        for shift in range(2 * farthest + 1):
            square = torch.minimum(square, wide.narrow(axis, shift, mask.shape[axis]) + (shift - farthest) ** 2)
    return square.sqrt()


def equalized(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 255, (B, 1, H, W), spread by each image's own histogram so that all are equally frequent."""
    flat = x.flatten(1).long()
    counts = torch.zeros(len(x), 256, dtype=x.dtype, device=x.device).scatter_add_(1, flat, torch.ones_like(x).flatten(1))
    first = counts.gather(1, flat.amin(1, keepdim=True))
    others = flat.shape[1] - first
    table = ((counts.cumsum(1) - first) * 255 / others.clamp(min=1)).round()
    return torch.where(others > 0, table.gather(1, flat), flat.to(x.dtype)).view_as(x)
