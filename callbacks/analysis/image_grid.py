"""A picture of what the attacks did."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...report.pictures import Caption, grid
from ..evaluation import RobustEvaluation
from ..outcome import Outcome


class ImageGrid(Callback):
    """For each attack a grid: clean, adversarial, and their difference, magnified; as PNG and in wandb.

    The captions are the true class and what the network says; red where it is wrong. The difference is magnified so that
    its largest entry in the grid fills the range, around mid-grey. Costs no pass over the network.

    Args:
        samples: columns of the grid.
        every_n_epochs: how often validation draws one; test always does.
        folder: where the PNGs go; None takes ``images`` in the trainer's root folder.

    Raises:
        ValueError: if samples or every_n_epochs is below 1.
    """

    def __init__(self, samples: int = 8, every_n_epochs: int = 1, folder: str | None = None) -> None:
        for name, value in (("samples", samples), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.samples, self.every_n_epochs, self.folder = samples, every_n_epochs, folder
        self._kept: tuple[Tensor, Outcome] | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # The evaluation may stand behind this callback, so the first batch is there when the second begins.
        if batch_idx == 1:
            self._kept = RobustEvaluation.ensure(trainer).last

    on_test_batch_start = on_validation_batch_start

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.current_epoch % self.every_n_epochs == 0:
            self._draw(trainer, f"val_epoch{trainer.current_epoch:03d}")
        self._kept = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "test")
        self._kept = None

    def _draw(self, trainer: Trainer, prefix: str) -> None:
        kept = self._kept or RobustEvaluation.ensure(trainer).last
        if kept is None or not trainer.is_global_zero:
            return
        x, outcome = kept
        names = getattr(trainer.datamodule, "class_names", None)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "images")
        folder.mkdir(parents=True, exist_ok=True)
        for attack, verdict in outcome.verdicts.items():
            n = min(self.samples, len(x))
            captions = _captions(outcome, attack, names, n)
            picture = grid(x[:n].float().cpu(), verdict.attacked.x_adv[:n].float().cpu(), captions)
            picture.save(folder / f"{prefix}_{attack}.png")
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"{prefix.split('_')[0]}/images_{attack}", [picture])


def _captions(outcome: Outcome, attack: str, names: list[str] | None, n: int) -> list[list[Caption]]:
    def say(classes: Tensor) -> list[str]:
        return [names[c] if names else str(c) for c in classes[:n].tolist()]

    y = outcome.y
    rows = []
    for predicted in (outcome.predictions["clean"], outcome.predictions[attack]):
        right = (predicted == y)[:n].tolist()
        rows.append(list(zip(say(predicted), right, strict=True)))
    return [*rows, [(f"is {name}", True) for name in say(y)]]
