"""The end of a run whose network is not that of its last step but one between two networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table


class AfterEachStep(Callback):
    """Calls ``do`` after each batch. A method's own hook comes after those of callbacks: too late for a checkpoint."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_batch_end(self, *_: Any) -> None:
        self.do()


def choose(clean: Sequence[float], robust: Sequence[float], tolerance: float) -> int:
    """Position of the highest clean accuracy among those that lose at most ``tolerance`` of the first's robust accuracy.

    Of equals the more robust one counts, then the nearer to the first.
    """
    allowed = [i for i, value in enumerate(robust) if value >= robust[0] - tolerance - 1e-9]
    return max(allowed, key=lambda i: (clean[i], robust[i], -i))


def forget_best(trainer: Trainer) -> None:
    """Let the next validation be the best so far: what came before is not what the run returns."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.best_model_score, callback.kth_best_model_path = {}, None, ""


def show(trainer: Trainer, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, on the first process."""
    if trainer.is_global_zero:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(title)
        console.print(table)
