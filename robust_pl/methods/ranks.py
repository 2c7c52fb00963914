"""State that differs between processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import distributed_c10d

_PATIENCE = timedelta(days=7)
_MEETINGS = count()


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` of every process, in order of rank, on every process; all of them must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all processes, on every process, all of which must call it; a tensor of its own. Nothing waits for it."""
    tensor = tensor.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all processes, see :func:`sum_over_ranks`."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return sum_over_ranks(tensor) / (torch.distributed.get_world_size() if several else 1)


@contextmanager
def others_wait(trainer: Trainer) -> Iterator[None]:
    """What the first process does here may take longer than a collective operation may; the others wait until it has ended.

    Some job managers end a job a while after its first process has ended, be it the one that writes the report or not.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    key = f"robust_pl/done/{next(_MEETINGS)}"
    try:
        yield
    finally:
        store = distributed_c10d._get_default_store()
        if trainer.is_global_zero:
            store.set(key, "")
        else:
            with suppress(RuntimeError):  # the first process, and the store with it, is gone
                store.wait([key], _PATIENCE)


def leave() -> None:
    """Part from the other processes, at the end of this one: gloo's threads, which would still run, could abort it else."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what holds a group, as DistributedDataParallel does, keeps it alive
        torch.distributed.destroy_process_group()
