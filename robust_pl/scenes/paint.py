"""Procedural textures, and the random numbers that they and the solids are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.hashing import hash_keys, uniform

_TEXELS = 64
_DARKEST, _GAP = 0.35, 0.3


class Numbers:
    """Random numbers that are a function of the key and of how many were drawn before."""

    def __init__(self, *key: int) -> None:
        self.key, self.drawn = hash_keys(*key), 0

    def many(self, count: int) -> Tensor:
        """From U[0, 1), float64 (count,)."""
        numbers = uniform(self.key, torch.arange(self.drawn, self.drawn + count))
        self.drawn += count
        return numbers

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self.many(1))

    def below(self, count: int) -> int:
        return int(self(0, count))


def random_picture(draw: Numbers) -> Tensor:
    """A texture (64, 64, 3) that can be repeated: plain, stripes, checks, dots or noise, of two colours."""
    pattern, cells = draw.below(5), 2 ** (1 + draw.below(3))
    return _painted(pattern, cells, _colors(draw), draw)


def class_picture(number: int, count: int) -> Tensor:
    """The texture (64, 64, 3) of one of ``count`` materials: always the same, each with a pattern and a hue of its own."""
    hue = number / count
    colors = (_rgb(hue, 0.75, 0.95), _rgb(hue + 1 / 3, 0.6, 0.5))
    return _painted(1 + number % 4, 2 ** (1 + number // 4 % 2), colors, Numbers(number, count))


def _painted(pattern: int, cells: int, colors: tuple[Tensor, Tensor], draw: Numbers) -> Tensor:
    place = torch.arange(_TEXELS, dtype=torch.float64) * cells / _TEXELS
    x, y = place.expand(_TEXELS, -1), place.unsqueeze(1).expand(-1, _TEXELS)
    patterns: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.zeros_like(x),
        lambda: ((x % 1) < 0.5).double(),
        lambda: (((x % 1) < 0.5) ^ ((y % 1) < 0.5)).double(),
        lambda: ((x % 1 - 0.5).square() + (y % 1 - 0.5).square() < 0.1).double(),
        lambda: _noise(draw),
    )
    first, second = colors
    share = patterns[pattern]().unsqueeze(-1)
    return (first * (1 - share) + second * share).float()


def _colors(draw: Numbers) -> tuple[Tensor, Tensor]:
    """Two colours (3,), their brightness at least 0.3 apart and their hue a fifth of the circle."""
    hue, saturation, value = draw(), draw(0.3, 0.9), draw(_DARKEST, 1.0)
    width = 1 - _DARKEST
    other = (value - _DARKEST + draw(_GAP, width - _GAP)) % width + _DARKEST
    return _rgb(hue, saturation, value), _rgb(hue + draw(0.2, 0.8), draw(0.3, 0.9), other)


def _rgb(hue: float, saturation: float, value: float) -> Tensor:
    ramp = (hue + torch.tensor([0, 2 / 3, 1 / 3], dtype=torch.float64)) * 6 % 6
    return value * (1 - saturation * (1 - ((ramp - 3).abs() - 1).clamp(0, 1)))


def _noise(draw: Numbers) -> Tensor:
    """Smooth noise in [0, 1] (64, 64) that continues over the border: random values on 8 x 8 knots, and twice as many."""
    total = torch.zeros(_TEXELS, _TEXELS, dtype=torch.float64)
    for knots, weight in ((8, 0.7), (16, 0.3)):
        grid = F.pad(draw.many(knots * knots).view(1, 1, knots, knots), (2, 2, 2, 2), mode="circular")
        step = _TEXELS // knots
        fine = F.interpolate(grid, scale_factor=step, mode="bicubic")[0, 0, 2 * step : -2 * step, 2 * step : -2 * step]
        total += weight * fine
    return ((total - 0.5) * 2 + 0.5).clamp(0.0, 1.0)
