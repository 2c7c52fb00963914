"""Noise: gaussian, shot, impulse, and speckle. Pixels float64 (B, 3, H, W), multiples of 1/255; results may leave [0, 1]."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .draws import Draws


def gaussian_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Adds N(0, sigma^2) to every value, as in little light."""
    return x + sigma * draws.normal(*x.shape[1:])


def shot_noise(x: Tensor, draws: Draws, photons: float) -> Tensor:
    """Counts photons: Poisson(photons * x) / photons."""
    table = _poisson(int(photons)).to(x.device)
    row, width = (x * 255).round(), table.shape[1]
    # Rows of cumulated probabilities, each above the one before, are one sorted list.
    found = torch.searchsorted(table.flatten(), row + draws.uniform(*x.shape[1:]), right=True)
    return (found - row.long() * width) / photons


def impulse_noise(x: Tensor, draws: Draws, amount: float) -> Tensor:
    """Makes a share of the values 0 or 1, each as often (salt and pepper)."""
    chance = draws.uniform(*x.shape[1:])
    return torch.where(chance < amount, (chance < amount / 2).to(x.dtype), x)


def speckle_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Noise in proportion to the value: x + x * N(0, sigma^2)."""
    return x + x * (sigma * draws.normal(*x.shape[1:]))


@lru_cache(maxsize=16)
def _poisson(photons: int) -> Tensor:
    """Probability of at most k photons, k = 0..photons, plus v, for each of the 256 pixel values v: (256, photons + 1).

    More photons are white, too, so that no more need to be told apart.
    """
    level = torch.arange(256, dtype=torch.float64).unsqueeze(1)
    count = torch.arange(photons + 1, dtype=torch.float64).expand(256, -1)
    share = torch.special.gammaincc(count + 1, (level * photons / 255).expand_as(count))
    return level + share.cummax(1).values
