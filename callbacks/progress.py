"""The progress bar, with the figures that matter."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import Progress, TaskID

_SHORT = {"train/loss": "loss", "val/acc_clean": "clean", "val/acc_worst": "robust"}
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_FIGURES = 0.5


class AttackBar:
    """How far a long attack is, and how many samples still stand: a bar in a rich display.

    Where the output is no terminal, it prints a line every half minute instead.
    """

    def __init__(self) -> None:
        self._display: Progress | None = None
        self._bar: TaskID | None = None
        self._shown: tuple[str, str] | None = None
        self._done = 0.0
        self._last_line = time.monotonic()

    def show(self, display: Progress | None, name: str, part: str, standing: int, done: float) -> None:
        """Show that ``part`` of the attack ``name`` is through to the share ``done`` in [0, 1]."""
        text = f"{name if part == name else f'{name} {part}'}: {standing} standing"
        if not sys.stdout.isatty():
            if done > 0 and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                print(f"{text}, {done:.0%}", flush=True)
            return
        if display is None:
            return
        if self._bar is None or display is not self._display:
            self._display, self._bar, self._shown = display, display.add_task(text, total=100), None
        if self._shown != (name, part) or done < self._done:  # the time left is that of the part, which may begin again
            self._shown = (name, part)
            display.reset(self._bar)
        self._done = done
        display.update(self._bar, completed=round(100 * done), description=text, visible=True)
        display.refresh()

    def hide(self) -> None:
        """Until the next attack."""
        if self._display is not None and self._bar is not None:
            self._display.update(self._bar, visible=False)


class ProgressBar(RichProgressBar):
    """Rich progress bar: training loss, clean and robust accuracy of the last validation, and how far a long attack is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attack_bar = AttackBar()
        self._figures: dict[str, Any] = {}
        self._read_at = float("-inf")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        # To read the loss is to wait for the device: now and then, not in every step.
        if trainer.training and time.monotonic() - self._read_at < _SECONDS_BETWEEN_FIGURES:
            return self._figures
        self._figures, self._read_at = self._read(trainer, pl_module), time.monotonic()
        return self._figures

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        found = super().get_metrics(trainer, pl_module)
        own = {_SHORT[key]: value for key, value in found.items() if key in _SHORT}
        # Whatever a method logs for the bar beside the base's own figures is shown as it is.
        other = {k: v for k, v in found.items() if k not in (*_SHORT, "v_num")}
        return {**own, **other}

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.attack_bar.hide()
        super().on_test_batch_end(trainer, *args, **kwargs)
        self._show_dealt(trainer, self.test_progress_bar_id)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.attack_bar.hide()
        super().on_validation_batch_end(trainer, *args, **kwargs)
        self._show_dealt(trainer, self.val_progress_bar_id)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.attack_bar.hide()
        super().on_predict_batch_end(trainer, *args, **kwargs)
        self._show_dealt(trainer, self.predict_progress_bar_id)

    # The last chunks may be others', so that no batch of this process tells that they are taken, too.
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        self._show_dealt(trainer, self.test_progress_bar_id)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._show_dealt(trainer, self.val_progress_bar_id)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_epoch_end(trainer, pl_module)
        self._show_dealt(trainer, self.predict_progress_bar_id)

    def _show_dealt(self, trainer: Trainer, bar: TaskID | None) -> None:
        """Where processes take batches as they are free, what all of them have taken says how far the evaluation is."""
        dealt = getattr(trainer.datamodule, "dealt", 0)
        if dealt and bar is not None and not self.is_disabled and not trainer.sanity_checking:
            self._update(bar, dealt)


def watch_attack(trainer: Trainer, name: str, part: str, standing: int, done: float) -> None:
    """Tell the trainer's progress bar, if it has one of ours."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar):
        bar.attack_bar.show(None if bar._progress_stopped else bar.progress, name, part, standing, done)
