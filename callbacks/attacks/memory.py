"""What a query attack was told: a ring of images with the network's answers, and which of them belong to which sample."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Answered queries. Once it is full the oldest ones are written over.

    Args:
        capacity: images it holds.
        samples: samples of the batch that they belong to.
        last: how many of its latest queries are found again for a sample.
        images: of the shape (..., C, H, W) that it is to hold.
        logits: of the shape (..., K) that it is to hold.
    """

    def __init__(self, capacity: int, samples: int, last: int, images: Tensor, logits: Tensor) -> None:
        self.capacity, self.last, self.total = capacity, last, 0
        self.images = torch.empty(capacity, *images.shape[-3:], device=images.device)
        self.logits = torch.empty(capacity, logits.shape[-1], device=images.device)
        self.values = torch.empty(capacity, device=images.device)
        # A query's number in the order of arrival, which also tells whether it has been written over; -1 for none.
        self._numbers = torch.full((samples, last), -1, device=images.device)
        self._queries = torch.zeros(samples, dtype=torch.int64, device=images.device)

    def __len__(self) -> int:
        return min(self.total, self.capacity)

    def add(self, ids: Tensor, images: Tensor, logits: Tensor, values: Tensor) -> None:
        """One query of each of the samples ``ids`` (n,): images (n, C, H, W), logits (n, K) and the objective (n,)."""
        numbers = self.total + torch.arange(len(ids), device=ids.device)
        self.total += len(ids)
        self._numbers[ids, self._queries[ids] % self.last] = numbers
        self._queries[ids] += 1
        kept = slice(-self.capacity, None)
        slots = numbers[kept] % self.capacity
        for ring, new in ((self.images, images), (self.logits, logits), (self.values, values)):
            ring[slots] = new[kept].to(ring.dtype)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and logits of ``size`` random queries, none of them twice, or of all if there are fewer."""
        rows = torch.randperm(len(self), generator=generator)[:size].to(self.images.device)
        return self.images[rows], self.logits[rows]

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latest queries of the samples ``ids`` (n,): images (n, last, C, H, W), objective (n, last) and which are there."""
        numbers = self._numbers[ids]
        there = numbers >= max(0, self.total - self.capacity)
        slots = numbers % self.capacity
        return self.images[slots], self.values[slots], there
