"""Which sample is read when: the training order, evaluation chunks, ranks, and resuming in the middle of an epoch.

These loaders wrap torch's DataLoader rather than derive from it: Lightning rebuilds every DataLoader it meets with its
own sampler, which would repeat samples and lose the position in the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .hashing import AUGMENT, ORDER, SPLIT, hash_keys, permutation
from .images import Images

Batch = tuple[Tensor, Tensor, Tensor]
"""(x float32 (B, C, H, W) in [0, 1], y int64 (B,), index int64 (B,))."""


class _Reader(Dataset[Any]):
    """Turns (epoch, positions) into a batch, in a worker or in the main process."""

    def __init__(self, images: Images, seed: int | None) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, request: tuple[int, Tensor]) -> Batch | Exception:
        epoch, index = request
        keys = None if self.seed is None else hash_keys(self.seed, AUGMENT, epoch, index)
        try:
            return (*self.images.read(index, keys), index)
        except (ValueError, OSError) as error:
            return error  # a worker that raises would bury the sentence in its traceback


def _read(images: Images, seed: int | None, epoch: int, batches: list[Tensor], num_workers: int) -> Iterator[Batch]:
    """The batches in order; ``seed`` None means without augmentation."""
    for batch in DataLoader(
        _Reader(images, seed),
        batch_size=None,
        sampler=[(epoch, index) for index in batches],  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise every iterator draws from the global stream
    ):
        if isinstance(batch, Exception):
            raise batch
        yield tuple(batch)


class TrainOrder:
    """The training batches of one rank, a function of (seed, epoch) only; the sampler that Lightning tells the epoch.

    Step ``s`` reads the same ``batch_size * world_size`` samples whatever the number of ranks; each takes its share.

    Args:
        index: int64 (N,), positions of the training samples.
        batch_size: samples a rank and a step.
        seed: of the order.
        rank: this process, in ``range(world_size)``.
        world_size: number of processes.
        drop_last: leave out the last incomplete step of an epoch. If kept, its samples are shared out evenly, and left
            out only if there are fewer than ranks.
        fixed: use the order of epoch 0 always (``Trainer(overfit_batches=...)``).

    Raises:
        ValueError: if there is not enough for a single step.
    """

    def __init__(
        self,
        index: Tensor,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        fixed: bool = False,
    ) -> None:
        self.index, self.seed, self.rank, self.world_size, self.fixed = index, seed, rank, world_size, fixed
        self.step = batch_size * world_size
        full, rest = divmod(len(index), self.step)
        self.steps = full + (not drop_last and rest >= world_size)
        self.epoch = 0
        if not self.steps:
            raise ValueError(
                f"{len(index)} training samples do not fill one step of batch_size={batch_size}"
                f" in {world_size} process(es): lower batch_size"
            )

    @property
    def plan(self) -> list[int]:
        """What an order must have in common with another one to go on where that stopped."""
        return [self.seed, len(self.index), self.step]

    @cached_property
    def samples(self) -> int:
        """A number that tells the set of training samples from others of its size."""
        return int(hash_keys(SPLIT, self.index).sum())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int) -> list[Tensor]:
        """Positions of each batch of this rank, int64 (B,) each."""
        steps = self.index[permutation(len(self.index), self.seed, ORDER, epoch)].split(self.step)
        return [step.tensor_split(self.world_size)[self.rank] for step in steps[: self.steps]]


class TrainLoader:
    """Training batches ``(x, y, index)``, stateful: a checkpoint in the middle of an epoch resumes at the next batch.

    Args:
        images: where samples are read.
        order: which samples, in which order.
        augment: whether samples are augmented.
        num_workers: processes that read ahead; 0 reads in this one.
        progress: returns the epoch and the number of its batches that training has completed; without it the epoch is
            the sampler's.
    """

    def __init__(
        self,
        images: Images,
        order: TrainOrder,
        augment: bool = True,
        num_workers: int = 0,
        progress: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.images, self.sampler, self.num_workers = images, order, num_workers
        self.seed = order.seed if augment else None
        self.progress = progress
        self._epoch, self._handed_out = 0, 0
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def epoch(self) -> int:
        """The epoch whose batches are being handed out: what its samples' keys were made from."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning makes its first iterator before it tells the sampler the epoch, so that is read at the
        # first batch. It tells one too many where a run limited by steps resumes from an epoch's end: ask for progress.
        completed = None
        if self.progress is not None:
            epoch, completed = self.progress()
            self.sampler.set_epoch(epoch)
        epoch = self.sampler.epoch
        start = self._start(epoch, completed)
        self._epoch, self._handed_out = epoch, start
        batches = self.sampler.batches(epoch)[start:]
        for batch in _read(self.images, self.seed, epoch, batches, self.num_workers):
            self._handed_out += 1
            yield batch

    def _start(self, epoch: int, completed: int | None) -> int:
        state, self._resumed = self._resumed, None
        if state is None or state["epoch"] != epoch or state["batches"] >= len(self):
            return 0
        if state["plan"] != self.sampler.plan:
            raise ValueError(
                "a checkpoint from the middle of an epoch was saved with (seed, training samples, samples a step) ="
                f" {tuple(state['plan'])} and cannot resume with {tuple(self.sampler.plan)}: use the same batch_size,"
                " processes, val_size and seed, or a checkpoint from an epoch's end"
            )
        if state.get("samples", self.sampler.samples) != self.sampler.samples:  # older checkpoints do not say
            raise ValueError(
                "a checkpoint from the middle of an epoch was saved in a run that held other samples out, and cannot resume: "
                "use the same val_split and val_size, or a checkpoint from an epoch's end"
            )
        # A checkpoint saved while an exception is handled counts a batch that was handed out but not trained on.
        return state["batches"] if completed is None else min(state["batches"], completed)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out: what workers have read ahead does not count."""
        order = self.sampler
        return {"epoch": self._epoch, "batches": self._handed_out, "plan": order.plan, "samples": order.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = dict(state)
        self._epoch, self._handed_out = state["epoch"], state["batches"]


class EvalLoader:
    """Evaluation batches ``(x, y, index)``: fixed chunks in ascending order, of which rank r takes r, r + W, ...

    No sample is repeated or dropped, so ranks may have unequal numbers of batches, or none. Therefore nothing may be
    reduced over ranks per batch, and metrics are logged in ``on_validation_epoch_end``: a rank without a batch never
    logs in ``validation_step``, and the others would wait for it in the reduction.

    Args:
        images: where samples are read.
        index: int64 (N,), positions of the samples, ascending.
        batch_size: samples a chunk, whatever the number of processes.
        rank: this process, in ``range(world_size)``.
        world_size: number of processes.
        num_workers: processes that read ahead; 0 reads in this one.
        finished: chunks to leave out, by the position of their first sample; ranks share what is left.
        limit: only the first so many chunks of each rank, or that share of them, whether finished or not.
    """

    def __init__(
        self,
        images: Images,
        index: Tensor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        finished: Collection[int] = (),
        limit: int | float = 1.0,
    ) -> None:
        chunks = list(index.split(batch_size))
        if limit != 1.0 or isinstance(limit, int):
            shares = [chunks[r::world_size] for r in range(world_size)]
            kept = [share[: limit if isinstance(limit, int) else int(len(share) * limit)] for share in shares]
            chunks = sorted((chunk for share in kept for chunk in share), key=lambda chunk: int(chunk[0]))
        if finished:
            chunks = [chunk for chunk in chunks if int(chunk[0]) not in finished]
        self.images, self.num_workers = images, num_workers
        self.batches = chunks[rank::world_size]
        self.some_rank_empty = len(chunks) < world_size

    def __len__(self) -> int:
        if self.some_rank_empty:
            # Lightning skips an evaluation of length 0 altogether, and the other ranks would wait for ever in the
            # reduction of their metrics; a loader without length is run on every rank.
            raise TypeError("some rank has no batch, so this loader has no length")
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from _read(self.images, None, 0, self.batches, self.num_workers)
