"""SWA: the equal average of the weights of many epochs."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from .averaging import Buffers, WeightAverage


class SWA(WeightAverage):
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407), without a learning rate of its own.

    From the end of epoch ``start`` on, every ``every`` epochs: ``average <- (n * average + weights) / (n + 1)``. The schedule
    is the method's; the authors keep a high constant learning rate while they average, adversarial training usually begins
    where its rate first drops. Averaged weights have other activations than raw ones, so BatchNorm's statistics are computed
    again, once for each new average that is evaluated or saved: that costs the attack and the forward passes of ``batches``
    training steps.

    Args:
        start: first epoch, counted from 0, at whose end weights are averaged; or its share of all epochs where it is a
            fraction below 1.
        every: epochs from one to the next.
        buffers: BatchNorm's statistics, see :class:`WeightAverage`: ``method`` forwards what the method trains on, ``clean``
            clean images.
        batches: for these, training batches of each process.
        name: of the average, where there are several.

    Raises:
        ValueError: if an argument is out of its range, or start is a share of epochs whose number is unknown.
    """

    def __init__(
        self,
        start: int | float = 0.75,
        every: int = 1,
        buffers: Buffers = "method",
        batches: int = 100,
        name: str = "swa",
    ) -> None:
        super().__init__(name, buffers, batches)
        if start < 0 or (start >= 1 and start != int(start)):
            raise ValueError(f"start={start} must be an epoch, or its share of all epochs, in [0, 1)")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.start, self.every = start, every
        self._models = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = int(self.start)
        if 0 < self.start < 1:
            if trainer.max_epochs in (None, -1):
                raise ValueError(f"start={self.start} is a share of all epochs: set trainer.max_epochs, or give an epoch")
            self._first = math.floor(self.start * trainer.max_epochs)

    def update(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        # Here and not at the end of the epoch, which Lightning calls only after the validation.
        since = trainer.current_epoch - self._first
        if not trainer.is_last_batch or since < 0 or since % self.every:
            return
        if self._models:
            self.move(1 / (self._models + 1))
        else:
            self.begin(trainer, pl_module)
        self._models += 1

    def progress(self) -> dict[str, Any]:
        return {"models": self._models}

    def load_progress(self, progress: dict[str, Any]) -> None:
        self._models = progress["models"]
