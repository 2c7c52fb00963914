"""How batches are read: out of a set on the training device, in this process, or in workers that stay."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .hashing import AUGMENT, hash_keys
from .images import Batch, Images
from .resident import ResidentImages

MOST_WORKERS = 8


def chosen_workers(images: Images, processes: int | None = None) -> int:
    """Workers that suit a set: none where its pixels lie ready, else this process' share of the cores, at most eight.

    Args:
        images: the set.
        processes: that train on this machine; None asks the environment, as torchrun sets it.
    """
    if images.parts() is not None:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes is None else processes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores // processes)


class _Samples(Dataset[Any]):
    """Turns (epoch, positions) into a batch, in a worker or in the main process; pixels may stay 8-bit ones."""

    def __init__(self, images: Images, seed: int | None, levels: bool) -> None:
        self.images, self.seed = images, seed
        # Who reads in a way of its own is asked to.
        self.read = images.levels if levels and type(images).read is Images.read else images.read

    def __getitem__(self, request: tuple[int, Tensor]) -> Batch | Exception:
        epoch, index = request
        keys = None if self.seed is None else hash_keys(self.seed, AUGMENT, epoch, index)
        try:
            return (*self.read(index, keys), index)
        except (ValueError, OSError, ImportError) as error:
            return error  # a worker that raises would bury the sentence in its traceback


class _Requests:
    """What is asked for next; a DataLoader that keeps its workers takes it anew in each epoch."""

    epoch: int
    batches: Iterable[Tensor]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        epoch = self.epoch
        return ((epoch, index) for index in self.batches)


class BatchReader:
    """Reads the batches that it is asked for, in order, each epoch with the same workers.

    Workers read into pinned memory where there is a CUDA device, so that copies there do not block. A set on a device is read
    there, whatever ``num_workers``. Where ``device`` is set before the first batch is read, batches are copied there: 8-bit
    pixels as such, a quarter of the bytes, and divided there with the same result.

    Args:
        images: where samples are read.
        seed: of the augmentation; None reads without.
        num_workers: processes that read ahead; 0 reads in this one, None chooses, see :func:`chosen_workers`.
        ahead: batches that each of them is asked for at a time.
        then: augments blocks of batches further, see :meth:`ResidentImages.batches`; only for a set on a device.
    """

    def __init__(
        self,
        images: Images,
        seed: int | None,
        num_workers: int | None = None,
        ahead: int = 2,
        then: Callable[[Batch, int], Batch] | None = None,
    ) -> None:
        resident = isinstance(images, ResidentImages)
        self.images, self.seed, self.ahead, self.then = images, seed, ahead, then
        self.num_workers = 0 if resident else chosen_workers(images) if num_workers is None else num_workers
        self.device: torch.device | None = None
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None
        self._stop: weakref.finalize | None = None
        self._turn = 0

    def read(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """The batches at these positions, int64 (B,) each; they are taken one by one as they are read, or read ahead.

        Raises:
            RuntimeError: if workers were asked for other batches before these were all read.
        """
        if isinstance(self.images, ResidentImages):
            yield from self.images.batches(self.seed, epoch, batches, self.then)
            return
        self._turn += 1
        turn = self._turn
        for batch in self._asked(epoch, batches):
            if isinstance(batch, Exception):
                raise batch
            self._check(turn)
            yield self._on_device(batch)
        self._check(turn)

    def _on_device(self, batch: Batch) -> Batch:
        if self.device is None:
            x, y, index = batch
            return x, y, index
        x, y, index = (part.to(self.device, non_blocking=True) for part in batch)
        if x.dtype == torch.uint8:
            x = x / self._white
        return x, y, index

    @cached_property
    def _white(self) -> Tensor:
        # CUDA multiplies by the inverse of a number, which rounds otherwise, but divides by a tensor.
        return torch.tensor(float(self.images.white), device=self.device)

    def close(self) -> None:
        """Stop the workers. Whoever reads again starts others."""
        if self._stop is not None:
            self._stop()
        self._loader = self._stop = None

    def _check(self, turn: int) -> None:
        if turn != self._turn and self.num_workers:
            raise RuntimeError(
                "a loader with workers was iterated a second time before the first had ended: make two, or set num_workers to 0"
            )

    def _asked(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[Any]:
        loader = self._loader
        if loader is None or not self.num_workers:
            self._requests = _Requests()
            loader = self._loader = DataLoader(
                _Samples(self.images, self.seed, levels=self.device is not None),
                batch_size=None,
                sampler=self._requests,  # type: ignore[arg-type]
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                prefetch_factor=self.ahead if self.num_workers else None,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # otherwise every iterator draws from the global stream
            )
        self._requests.epoch, self._requests.batches = epoch, batches
        iterator = iter(loader)
        if self.num_workers and self._stop is None:
            # Left to the garbage collector, which closes their queues first, each would be waited for in vain for five seconds.
            self._stop = weakref.finalize(self, iterator._shutdown_workers)  # type: ignore[attr-defined]
            self._stop.atexit = False  # torch sees to that
        return iterator
