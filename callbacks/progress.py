"""The progress bar, with the figures that matter."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"train/loss": "loss", "val/acc_clean": "clean", "val/acc_worst": "robust"}
_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar(RichProgressBar):
    """Rich progress bar: training loss, clean and robust accuracy of the last validation, and how far a long attack is.

    Where the output is no terminal, a long attack prints a line every half minute instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attack: tuple[str, str] | None = None
        self._attack_bar: Any = None
        self._last_line = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        found = super().get_metrics(trainer, pl_module)
        own = {_SHORT[key]: value for key, value in found.items() if key in _SHORT}
        # Whatever a method logs for the bar beside the base's own figures is shown as it is.
        other = {k: v for k, v in found.items() if k not in (*_SHORT, "v_num")}
        return {**own, **other}

    def show_attack(self, name: str, part: str, standing: int, done: float) -> None:
        """Show that ``part`` of the attack ``name`` is through to the share ``done``, and how many samples still stand."""
        text = f"{name if part == name else f'{name} {part}'}: {standing} standing"
        if not sys.stdout.isatty():
            if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                print(f"{text}, {done:.0%}", flush=True)
            return
        if self.progress is None or self._progress_stopped:
            return
        if self._attack_bar is None:
            self._attack_bar = self._add_task(100, text)
        if self._attack != (name, part):  # the time left is that of the part
            self._attack = (name, part)
            self.progress.reset(self._attack_bar, description=text)
        self.progress.update(self._attack_bar, completed=round(100 * done), description=text, visible=True)
        self.refresh()

    def _hide_attack(self) -> None:
        if self.progress is not None and self._attack_bar is not None:
            self.progress.update(self._attack_bar, visible=False)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._hide_attack()
        super().on_test_batch_end(*args, **kwargs)

    def _stop_progress(self) -> None:
        super()._stop_progress()
        self._attack, self._attack_bar = None, None


def watch_attack(trainer: Trainer, name: str, part: str, standing: int, done: float) -> None:
    """Tell the trainer's progress bar, if it has one of ours."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar):
        bar.show_attack(name, part, standing, done)
