"""Random numbers for attacks: reproducible, and never from the global stream.

Training takes one stream a call. Evaluation keys every number by the sample it belongs to, so that the outcome for a
sample does not depend on the batch, the number of processes, the device or what ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...data.hashing import hash_keys, uniform
from ...data.hashing import seed_from as seed_from

CHUNK = 16
"""Samples that share one seed in evaluation: few enough that odd batches waste little, enough to draw in bulk."""


class Draws(Protocol):
    """Source of random tensors with the shape, dtype and device of ``like`` (B, ...)."""

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers from U[0, 1)."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Numbers from N(0, 1)."""
        ...

    def few(self, like: Tensor, count: int) -> Tensor:
        """``count`` numbers from U[0, 1) a sample, float64 (B, count) beside ``like``: cheap, for thousands of calls."""
        ...

    def rows(self, rows: Tensor) -> Draws:
        """The numbers of the samples at ``rows`` (n,) alone, from here on."""
        ...

    def fork(self, key: int | str) -> Draws:
        """Numbers for the same samples that do not depend on how many were drawn from these, another set for each key."""
        ...


class StreamDraws:
    """One generator on the device of the data: the cheap source for training and for plain calls.

    Args:
        seed: what :func:`seed_from` returned.
        device: where the numbers are needed.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def few(self, like: Tensor, count: int) -> Tensor:
        return torch.rand((len(like), count), generator=self.generator, dtype=torch.float64, device=like.device)

    def rows(self, rows: Tensor) -> StreamDraws:
        return self  # the generator goes on, so nothing is drawn twice

    def fork(self, key: int | str) -> StreamDraws:
        return StreamDraws(seed_from(self.seed, key), self.device)


class SampleDraws:
    """Numbers that belong to samples: a function of (key, index, how many draws came before) alone.

    They are drawn on the CPU, where every machine gives the same numbers, and moved.

    Args:
        key: what tells this draw from others: seed, attack, restart.
        index: position of each sample in its data set, int64 (B,).
    """

    def __init__(self, key: tuple[int | str, ...], index: Tensor) -> None:
        self.key, self.index = key, index.cpu()
        self._place = self.index % CHUNK
        self._chunks, self._which = torch.unique(self.index // CHUNK, return_inverse=True)
        self._keys: Tensor | None = None
        self.drawn = 0

    def uniform(self, like: Tensor) -> Tensor:
        return self._draw(torch.rand, like)

    def normal(self, like: Tensor) -> Tensor:
        return self._draw(torch.randn, like)

    def few(self, like: Tensor, count: int) -> Tensor:
        if self._keys is None:
            self._keys = hash_keys(seed_from(*self.key), self.index).unsqueeze(1)
        numbers = uniform(hash_keys(self._keys, self.drawn), torch.arange(count))
        self.drawn += 1
        return numbers.to(like.device)

    def rows(self, rows: Tensor) -> SampleDraws:
        part = SampleDraws(self.key, self.index[rows.cpu()])
        part.drawn = self.drawn
        return part

    def fork(self, key: int | str) -> SampleDraws:
        return SampleDraws((*self.key, key), self.index)

    def _draw(self, source: Callable[..., Tensor], like: Tensor) -> Tensor:
        numbers = torch.empty(len(self._chunks), CHUNK, *like.shape[1:], dtype=like.dtype)
        generator = torch.Generator()
        for slot, chunk in zip(numbers, self._chunks.tolist(), strict=True):
            generator.manual_seed(seed_from(*self.key, chunk, self.drawn))
            source(slot.shape, generator=generator, out=slot)
        self.drawn += 1
        return numbers[self._which, self._place].to(like.device)
