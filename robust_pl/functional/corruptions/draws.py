"""Random numbers of a batch, each a function of its sample's key and of how many were drawn before."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..hashing import uniform

_HALF = 2.0**-54


class Draws:
    """Source of random numbers, float64 (B, ...) on the device of the keys.

    Args:
        keys: int64 (B,).
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.drawn = keys, 0

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from U[0, 1), (B, *shape)."""
        count = prod(shape)
        place = torch.arange(self.drawn, self.drawn + count, device=self.keys.device)
        self.drawn += count
        return uniform(self.keys.unsqueeze(1), place).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Numbers from N(0, 1), (B, *shape)."""
        return torch.special.ndtri(self.uniform(*shape) + _HALF)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Int64 in [low, high), (B, *shape)."""
        return (self.uniform(*shape) * (high - low)).long() + low
