"""A fixed set of training samples that a monitor asks again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ...data.base import ImageDataModule
from ...functional.losses import hard

_CHUNK = 128


class ProbeSet:
    """A process's share of a fixed set of training samples, without augmentation.

    They are spread evenly over the data module's training split, which also suits sets that are sorted by class. Where the
    data module is not one of ours, they are the first that training sees, as it sees them.

    Args:
        samples: how many, over all processes.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._missing = 0

    def read(self, trainer: Trainer) -> None:
        """Read the samples, or get ready to collect them."""
        share = slice(trainer.global_rank, None, trainer.world_size)
        self._parts, self._missing = [], len(range(self.samples)[share])
        data = trainer.datamodule
        if isinstance(data, ImageDataModule):
            index = data.split[0]
            n = min(self.samples, len(index))
            index = index[torch.arange(n) * len(index) // n][share]
            self._parts, self._missing = [(*data.train_set.read(index, None), index)], 0

    def collect(self, batch: Any) -> None:
        """Keep samples of a training batch (x, y) or (x, y, index) while some are missing."""
        if self._missing:
            x, y = (part[: self._missing].detach().cpu().clone() for part in batch[:2])
            first = sum(len(part[0]) for part in self._parts)
            self._parts.append((x, y, torch.arange(first, first + len(x))))
            self._missing -= len(x)

    def chunks(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pixels (B, C, H, W), labels int64 (B,) and positions (B,), a chunk at a time."""
        if not self._parts:
            return
        x, y, index = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        for x_, y_, index_ in zip(*(t.split(_CHUNK) for t in (x.to(dtype), hard(y), index)), strict=True):
            yield x_.to(device), y_.to(device), index_.to(device)


def log_figures(trainer: Trainer, prefix: str, figures: Mapping[str, float]) -> None:
    """Hand figures that hold for all processes to the loggers, at this step."""
    for logger in trainer.loggers:
        logger.log_metrics({f"{prefix}/{key}": value for key, value in figures.items()}, step=trainer.global_step)
