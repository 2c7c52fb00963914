"""Procedural textures of frost on a window, so that no photographs need to be there."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hashing import hash_keys, seed_from
from .draws import Draws

_COUNT, _SIZE, _SMALLER = 5, 320, 5
_SEEDS, _BUDS = 0.006, 0.08
_STEM, _BRANCH = 60, 16
_DARK, _PALE = (0.10, 0.17, 0.26), (0.93, 0.97, 1.0)


@lru_cache(maxsize=2)
def ice_textures(small: bool) -> Tensor:
    """Five periodic textures, float64 (5, 3, n, n) in [0, 1], on the CPU; they are always the same. Takes about a second once.

    Needles grow from random seeds along a smooth field of directions (line integral convolution, Cabral and Leedom 1993) and
    branch at 60 degrees to both sides, denser in some patches than in others, in pale over dark blue.

    Args:
        small: a fifth as large, n = 64, as the benchmark shrinks its photographs for images of 32 pixels; else n = 320.
    """
    draws = Draws(hash_keys(seed_from("ice"), torch.arange(_COUNT)))
    turn, patches = 1.5 * math.pi * _clouds(draws, 2), _clouds(draws, 4)
    seeds = (draws.uniform(_SIZE, _SIZE) < _SEEDS * patches).double()
    ferns = _grown(seeds, turn, _STEM)
    for side in (-1, 1):
        buds = ferns.sqrt() * (draws.uniform(_SIZE, _SIZE) < _BUDS)
        ferns = ferns + 0.8 * _grown(buds, turn + side * math.pi / 3, _BRANCH)
    for axis in (1, 2):  # needles are not made of pixels
        ferns = ferns / 2 + (ferns.roll(1, axis) + ferns.roll(-1, axis)) / 4
    ice = (0.42 * ferns / ferns.mean((1, 2), keepdim=True) * (0.2 + patches) + 0.5 * patches**2).clamp(max=1.0).unsqueeze(1)
    dark, pale = (torch.tensor(color, dtype=torch.float64).view(3, 1, 1) for color in (_DARK, _PALE))
    large = dark + ice * (pale - dark)
    return F.avg_pool2d(large, _SMALLER) if small else large


def _clouds(draws: Draws, knots: int) -> Tensor:
    """Smooth periodic noise in [0, 1], (5, n, n): random values on few knots, and finer ones of less weight."""
    total = torch.zeros(_COUNT, _SIZE, _SIZE, dtype=torch.float64)
    for octave in range(4):
        count = knots << octave
        place = torch.arange(_SIZE, dtype=torch.float64) * (count / _SIZE)
        low = place.long()
        share = (1 - (math.pi * (place - low)).cos()) / 2
        weight = torch.zeros(_SIZE, count, dtype=torch.float64)
        weight[torch.arange(_SIZE), low] = 1 - share
        weight[torch.arange(_SIZE), (low + 1) % count] = share
        total += 0.5**octave * (weight @ draws.uniform(count, count) @ weight.T)
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / (high - low)


def _grown(seeds: Tensor, turn: Tensor, length: int) -> Tensor:
    """Sums of what lies behind each pixel along the field of directions ``turn`` in radians, less of what lies farther."""
    n = seeds.shape[-1]
    row, column = (place.expand_as(seeds).clone() for place in (torch.arange(n).double().view(-1, 1), torch.arange(n).double()))
    down, right, total = turn.sin().flatten(1), turn.cos().flatten(1), torch.zeros_like(seeds)
    for step in range(length):
        place = ((row.round().long() % n) * n + column.round().long() % n).flatten(1)
        total += (1 - step / length) * seeds.flatten(1).gather(1, place).view_as(seeds)
        row += down.gather(1, place).view_as(seeds)
        column += right.gather(1, place).view_as(seeds)
    return total
