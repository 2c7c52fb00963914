"""What can be said of the training set of a run before it is read: its size, and what tells it from others."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from ..callbacks.store.files import sha256_of_tensors
from ..data import ImageDataModule

_FIRST = 16


def sizes_of(trainer: Trainer, who: str) -> tuple[int, tuple[int, ...], int]:
    """Samples of the training set, as many as there are indices; shape of each; and samples in a batch of one process.

    Args:
        trainer: that fits.
        who: asks for it, in an error's words.

    Raises:
        ValueError: if they are unknown.
    """
    data = trainer.datamodule
    if isinstance(data, ImageDataModule):
        return len(data.train_images()), tuple(data.image_shape), data.batch_size
    loader = trainer.train_dataloader
    dataset, batch_size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if not hasattr(dataset, "__len__") or batch_size is None:
        raise ValueError(
            f"{who} keeps something of every training sample and must know how many there are: pass an ImageDataModule, or a "
            "DataLoader with a batch_size over a dataset that has a length"
        )
    return len(dataset), tuple(dataset[0][0].shape), batch_size


def identity_of(trainer: Trainer, samples: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """What tells the training samples of one run from those of another, in words that JSON can hold."""
    known = {"samples": samples, "shape": list(shape)}
    data = trainer.datamodule
    if not isinstance(data, ImageDataModule):
        return known
    x, y = data.train_set.read(torch.arange(min(_FIRST, len(data.train_set))), None)
    sums = {"pixels": {"x": x, "y": y}, "split": {"train": data.split[0]}}
    return {"data": type(data).__name__, **known, **{name: sha256_of_tensors(t)[:8] for name, t in sums.items()}}
