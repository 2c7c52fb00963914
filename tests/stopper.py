"""Callbacks that stop a run as a crash would: without an end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfterEpoch(Callback):
    """Stops after the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class CrashAfterBatch(Callback):
    """Crashes after the fifth batch of the first epoch, two steps after a checkpoint."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("crash")


class CrashInValidation(Callback):
    """Crashes in the validation after the first epoch."""

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            raise RuntimeError("crash")


class Ruin(Callback):
    """Makes the network useless after each epoch, before it is validated."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for parameter in pl_module.parameters():
                parameter.data.zero_()
