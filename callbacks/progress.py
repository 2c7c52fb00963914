"""The progress bar, with the figures that matter."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"train/loss": "loss", "val/acc_clean": "clean", "val/acc_worst": "robust"}


class ProgressBar(RichProgressBar):
    """Rich progress bar that shows the training loss, and clean and robust accuracy of the last validation."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        found = super().get_metrics(trainer, pl_module)
        own = {_SHORT[key]: value for key, value in found.items() if key in _SHORT}
        # Whatever a method logs for the bar beside the base's own figures is shown as it is.
        other = {k: v for k, v in found.items() if k not in (*_SHORT, "v_num")}
        return {**own, **other}
