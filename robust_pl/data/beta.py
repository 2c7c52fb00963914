"""Numbers of a Beta distribution, and of a Dirichlet distribution by way of them, from numbers of a uniform one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .hashing import uniform

_KNOTS = 4096


class Beta:
    """Beta numbers of uniform ones: the distribution's quantiles, linear between the knots of a table.

    Quantiles, since a Beta number that is accepted or rejected would make the device wait.

    Args:
        a: above 0.
        b: above 0.
    """

    def __init__(self, a: float, b: float) -> None:
        from scipy.special import betaincinv

        self._quantiles = torch.from_numpy(betaincinv(a, b, np.linspace(0, 1, _KNOTS + 1)))

    def __call__(self, u: Tensor) -> Tensor:
        """Float64 of the shape of ``u``, which is float64 in [0, 1)."""
        if self._quantiles.device != u.device:
            self._quantiles = self._quantiles.to(u.device)
        place = u * _KNOTS
        below = place.long()
        return torch.lerp(self._quantiles[below], self._quantiles[below + 1], place - below)


class Dirichlet:
    """Shares that sum to 1, with equal concentrations ``alpha``: each is a Beta share of what the ones before it left.

    Args:
        alpha: above 0.
        count: of the shares, at least 1.
    """

    def __init__(self, alpha: float, count: int) -> None:
        self._cuts = [Beta(alpha, alpha * (count - 1 - i)) for i in range(count - 1)]

    def __call__(self, keys: Tensor, draw: int) -> Tensor:
        """Float64 (count, B), drawn by ``keys`` (B,) from the number ``draw`` on, count - 1 draws each."""
        left, shares = torch.ones_like(keys, dtype=torch.float64), []
        for i, cut in enumerate(self._cuts):
            shares.append(left * cut(uniform(keys, draw + i)))
            left = left - shares[-1]
        return torch.stack([*shares, left])
