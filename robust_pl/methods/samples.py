"""Samples of a run outside of its steps: for what a method measures before or after it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ..data import ImageDataModule
from ..data.loaders import EvalLoader

Batch = tuple[Tensor, Tensor, Tensor]


def training_samples(trainer: Trainer, count: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """At most ``count`` training samples (x, y, index), the same on every process.

    Those of an :class:`ImageDataModule` are spread evenly over the training set and not augmented; those of a user's own
    loader are its first ones, as they come. It is a loader of its own: that of the training does not move.
    """
    data = trainer.datamodule
    if isinstance(data, ImageDataModule):
        index = data.split[0]
        count = min(count, len(index))
        chosen = index[torch.arange(count) * len(index) // count]
        batches: Iterable[Any] = EvalLoader(data.train_set, chosen, batch_size, num_workers=data.num_workers)
    else:
        batches = trainer.fit_loop._data_source.dataloader()
    for x, y, index in _indexed(batches, device):
        yield x[:count], y[:count], index[:count]
        count -= len(x)
        if count <= 0:
            return


def validation_samples(trainer: Trainer, device: torch.device) -> Iterator[Batch]:
    """All validation samples (x, y, index) of this process; of several loaders those of the first.

    Raises:
        ValueError: if the run has none.
    """
    yield from _indexed(_validation_loader(trainer), device)


def require_validation(trainer: Trainer, who: str) -> None:
    """Refuse a run without validation samples, on which ``who`` chooses."""
    if _validation_loader(trainer) is None:
        raise ValueError(f"{who} chooses on validation samples and there are none: set data.init_args.val_size above 0")


def _validation_loader(trainer: Trainer) -> Any:
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders = source.dataloader() if source.is_defined() else []
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    return loaders[0] if loaders else None


def _indexed(batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """(x, y, index) on the device; without an index in the batch it is the position."""
    seen = 0
    for x, y, *rest in batches:
        index = rest[0] if rest else torch.arange(seen, seen + len(x))
        seen += len(x)
        yield x.to(device), y.to(device), index.to(device)
