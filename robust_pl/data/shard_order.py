"""The order of training samples in shards: few files at a time, and yet a function of the seed and the epoch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .hashing import ORDER, hash_keys, permutation
from .loaders import TrainOrder


class ShardOrder(TrainOrder):
    """Training batches of few shards at a time: shards in random order, and the samples of ``mixed`` neighbours mixed.

    Like every order a function of (seed, epoch) only, of no worker and no rank: step ``s`` reads the same samples whatever the
    number of ranks, so that each of them reads its share of the same few files.

    Args:
        index: int64 (N,), ascending positions of the training samples.
        first: int64 (S,), position of each shard's first sample, ascending.
        mixed: shards among which samples are mixed.
        batch_size: samples a rank and a step.
        seed: of the order.
        rank: this process, in ``range(world_size)``.
        world_size: number of processes.
        drop_last: see :class:`TrainOrder`.
        fixed: use the order of epoch 0 always.

    Raises:
        ValueError: if there is not enough for a single step.
    """

    def __init__(
        self,
        index: Tensor,
        first: Tensor,
        mixed: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        fixed: bool = False,
    ) -> None:
        super().__init__(index, batch_size, seed, rank, world_size, drop_last, fixed)
        self.shard, self.shards, self.mixed = torch.bucketize(index, first, right=True) - 1, len(first), mixed

    planned_by = (*TrainOrder.planned_by, "shards", "mixed")

    @property
    def plan(self) -> list[int]:
        return [*super().plan, self.shards, self.mixed]

    def order(self, epoch: int) -> Tensor:
        turn = permutation(self.shards, self.seed, ORDER, epoch).argsort()
        group = turn[self.shard] // self.mixed
        by_hash = hash_keys(self.seed, ORDER, epoch, self.index).argsort(stable=True)
        return self.index[by_hash[group[by_hash].argsort(stable=True)]]
