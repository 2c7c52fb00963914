"""Digital: brightness, contrast, elastic, pixelate, JPEG, and saturate. Pixels float64 (B, 3, H, W), multiples of 1/255."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .draws import Draws
from .filters import gaussian

_FIXED = 1 << 22
"""Pillow's weights are whole multiples of its inverse."""


def brightness(x: Tensor, draws: Draws, more: float) -> Tensor:
    """Adds to the value of HSV, its largest channel, up to 1: the others grow in proportion, and black becomes grey."""
    value = x.amax(1, keepdim=True)
    brighter = (value + more).clamp(max=1.0)
    return torch.where(value > 0, x * (brighter / value), brighter)


def saturate(x: Tensor, draws: Draws, factor: float, more: float) -> Tensor:
    """Multiplies the saturation of HSV and adds to it, within [0, 1]; grey, whose hue is taken for red's, turns reddish."""
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - least
    saturation = torch.where(value > 0, spread / value, 0.0)
    lack = torch.where(spread > 0, (value - x) / spread, x.new_tensor([0.0, 1.0, 1.0]).view(3, 1, 1))
    return value * (1 - (factor * saturation + more).clamp(0, 1) * lack)


def contrast(x: Tensor, draws: Draws, factor: float) -> Tensor:
    """Moves values towards the mean of their channel."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def elastic_transform(x: Tensor, draws: Draws, strength: float, sigma: float, corners: float) -> Tensor:
    """A random affine map, and then a smooth random displacement; both mirror the image at its border."""
    h, w = x.shape[-2:]
    y = _turned(x, corners * (2 * draws.uniform(3, 2) - 1))
    if not strength:
        return y
    way = gaussian(2 * draws.uniform(2, h, w) - 1, sigma, truncate=3.0, border="reflect") * strength
    column = torch.arange(w, device=x.device) + way[:, 0]
    row = torch.arange(h, device=x.device).unsqueeze(1) + way[:, 1]
    grid = torch.stack([(2 * column + 1) / w - 1, (2 * row + 1) / h - 1], 3)
    return F.grid_sample(y, grid, "bilinear", "reflection", align_corners=False)


def _turned(x: Tensor, moved: Tensor) -> Tensor:
    """Images under the affine maps that move three corners of a square by ``moved``, (B, 3, 2) in pixels, (column, row)."""
    h, w = x.shape[-2:]
    size = min(h, w) // 3
    middle = x.new_tensor([w // 2, h // 2])
    before = middle + size * x.new_tensor([[1, 1], [1, -1], [-1, -1]])
    after = before + moved
    # What is drawn at a place comes from where the inverse map sends it.
    back = torch.linalg.solve(F.pad(after, (0, 1), value=1.0), before.expand_as(after))
    row, column = torch.meshgrid(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in (h, w)), indexing="ij")
    source = torch.stack([column, row, torch.ones_like(row)], 2) @ back.unsqueeze(1)
    grid = 2 * source / x.new_tensor([w - 1, h - 1]) - 1
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=True)


def pixelate(x: Tensor, draws: Draws, scale: float) -> Tensor:
    """Shrinks the image with a box filter and enlarges it again: bit for bit what Pillow's ``BOX`` gives."""
    h, w = x.shape[-2:]
    y = x * 255
    for height, width in ((int(h * scale), int(w * scale)), (h, w)):
        y = _eight_bit(y @ box_matrix(y.shape[-1], width).to(y.device).T)
        y = _eight_bit(box_matrix(y.shape[-2], height).to(y.device) @ y)
    return y / 255


def _eight_bit(sums: Tensor) -> Tensor:
    """Pillow's rounding, after the rows and again after the columns."""
    return ((sums + _FIXED // 2) / _FIXED).floor().clamp(0, 255)


@lru_cache(maxsize=64)
def box_matrix(n: int, m: int) -> Tensor:
    """Matrix (m, n) that resizes n pixels to m as Pillow's ``BOX`` does, times 2^22: each is a mean of whole pixels.

    Its entries are whole numbers, and float64 holds their sums exactly.
    """
    scale = n / m
    reach = max(scale, 1.0) / 2
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for place in range(m):
        centre = (place + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), n)
        among = [one for one in range(first, last) if -0.5 < (one - centre + 0.5) / max(scale, 1.0) <= 0.5]
        matrix[place, among] = math.floor(_FIXED / len(among) + 0.5)
    return matrix


def jpeg_compression(x: Tensor, draws: Draws, quality: float) -> Tensor:
    """JPEG by Pillow, one image after the other on the CPU: the standard leaves decoders too much freedom to do without one."""
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = torch.from_numpy(np.stack([_through_jpeg(image, int(quality)) for image in images]))
    return decoded.to(x.device).permute(0, 3, 1, 2).to(x.dtype) / 255


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.asarray(decoded)
