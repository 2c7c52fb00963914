"""Which sample is read when: the training order, evaluation chunks, ranks, and resuming in the middle of an epoch.

These loaders wrap torch's DataLoader rather than derive from it: Lightning rebuilds every DataLoader it meets with its
own sampler, which would repeat samples and lose the position in the epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .dealer import Dealer
from .hashing import ORDER, SPLIT, hash_keys, permutation
from .images import Batch, Images
from .reading import BatchReader


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

    planned_by: tuple[str, ...] = ("seed", "training samples", "samples a step")
    """What the numbers of :attr:`plan` are."""

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

    def order(self, epoch: int) -> Tensor:
        """Positions of all samples as they are trained on, int64 (N,)."""
        return self.index[permutation(len(self.index), self.seed, ORDER, epoch)]

    def batches(self, epoch: int) -> list[Tensor]:
        """Positions of each batch of this rank, int64 (B,) each."""
        steps = self.order(epoch).split(self.step)
        return [step.tensor_split(self.world_size)[self.rank] for step in steps[: self.steps]]


class TrainLoader:
    """Training batches ``(x, y, index)``, stateful: a checkpoint in the middle of an epoch resumes at the next batch.

    Args:
        images: where samples are read.
        order: which samples, in which order.
        augment: whether samples are augmented.
        num_workers: processes that read ahead; 0 reads in this one, None chooses.
        progress: returns the epoch and the number of its batches that training has completed; without it the epoch is
            the sampler's.
        then: augments further what is read from a set on the training device; see :meth:`ResidentImages.batches`.
    """

    def __init__(
        self,
        images: Images,
        order: TrainOrder,
        augment: bool = True,
        num_workers: int | None = None,
        progress: Callable[[], tuple[int, int]] | None = None,
        then: Callable[[Batch, int], Batch] | None = None,
    ) -> None:
        self.sampler, self.progress = order, progress
        self.reader = BatchReader(images, order.seed if augment else None, num_workers, then=then)
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
        for batch in self.reader.read(epoch, batches):
            self._handed_out += 1
            yield batch

    def _start(self, epoch: int, completed: int | None) -> int:
        state, self._resumed = self._resumed, None
        if state is None or state["epoch"] != epoch or state["batches"] >= len(self):
            return 0
        if state["plan"] != self.sampler.plan:
            raise ValueError(
                f"a checkpoint from the middle of an epoch was saved with ({', '.join(self.sampler.planned_by)}) ="
                f" {tuple(state['plan'])} and cannot resume with {tuple(self.sampler.plan)}: use the same batch_size,"
                " processes, val_size, seed and settings of the data, or a checkpoint from an epoch's end"
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
    """Evaluation batches ``(x, y, index)``: fixed chunks in ascending order, of which rank r takes r, r + W, ..., or, where
    there is a dealer, r and then the next one that nobody has.

    No sample is repeated or dropped, so ranks may have unequal numbers of batches, or none. Therefore nothing may be
    reduced over ranks per batch, and metrics are logged in ``on_validation_epoch_end``: a rank without a batch never
    logs in ``validation_step``, and the others would wait for it in the reduction.

    Args:
        images: where samples are read.
        index: int64 (N,), positions of the samples, ascending.
        batch_size: samples a chunk, whatever the number of processes.
        rank: this process, in ``range(world_size)``.
        world_size: number of processes.
        num_workers: processes that read ahead; 0 reads in this one, None chooses.
        finished: chunks to leave out, by the position of their first sample; ranks share what is left.
        limit: only the first so many chunks of each rank, or that share of them, whether finished or not.
        dealer: hands out the chunks. The length is then that of all ranks together, and each ends where none is left.
    """

    def __init__(
        self,
        images: Images,
        index: Tensor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        finished: Collection[int] = (),
        limit: int | float = 1.0,
        dealer: Dealer | None = None,
    ) -> None:
        chunks = list(index.split(batch_size))
        if limit != 1.0 or isinstance(limit, int):
            shares = [chunks[r::world_size] for r in range(world_size)]
            kept = [share[: limit if isinstance(limit, int) else int(len(share) * limit)] for share in shares]
            chunks = sorted((chunk for share in kept for chunk in share), key=lambda chunk: int(chunk[0]))
        if finished:
            chunks = [chunk for chunk in chunks if int(chunk[0]) not in finished]
        self.reader = BatchReader(images, None, num_workers, ahead=2 if dealer is None else 1)
        self.chunks, self.dealer, self._ranks = chunks, dealer, (rank, world_size)
        self.batches = chunks[rank::world_size]
        self.some_rank_empty = len(chunks) < (1 if dealer else world_size)

    def __len__(self) -> int:
        if self.some_rank_empty:
            # Lightning skips an evaluation of length 0 altogether, and the other ranks would wait for ever in the
            # reduction of their metrics; a loader without length is run on every rank.
            raise TypeError("some rank has no batch, so this loader has no length")
        return len(self.chunks if self.dealer else self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self.dealer is None:
            return self.reader.read(0, self.batches)
        # A generator, since the dealer is told to begin after Lightning has made its iterator.
        chunks = (self.chunks[place] for place in self.dealer.deal(len(self.chunks), *self._ranks))
        return self._read_in_pieces(chunks) if self.reader.num_workers else self.reader.read(0, chunks)

    def _read_in_pieces(self, chunks: Iterator[Tensor]) -> Iterator[Batch]:
        """All workers read one chunk together, so that none but the next one is taken before its turn."""
        counts: deque[int] = deque()

        def pieces() -> Iterator[Tensor]:
            for chunk in chunks:
                cut = chunk.split(-(-len(chunk) // self.reader.num_workers))
                counts.append(len(cut))
                yield from cut

        read = self.reader.read(0, pieces())
        for first in read:
            parts = [first, *islice(read, counts.popleft() - 1)]
            x, y, index = (torch.cat(column) for column in zip(*parts, strict=True))
            yield x, y, index
