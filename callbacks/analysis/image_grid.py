"""A picture of what the attacks did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation import RobustEvaluation
from ..outcome import Outcome

_CELL, _GAP, _CAPTION, _MARGIN = 96, 6, 14, 110


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


Caption = tuple[str, bool]


def _captions(outcome: Outcome, attack: str, names: list[str] | None, n: int) -> list[list[Caption]]:
    def say(classes: Tensor) -> list[str]:
        return [names[c] if names else str(c) for c in classes[:n].tolist()]

    y = outcome.y
    rows = []
    for predicted in (outcome.predictions["clean"], outcome.predictions[attack]):
        right = (predicted == y)[:n].tolist()
        rows.append(list(zip(say(predicted), right, strict=True)))
    return [*rows, [(f"is {name}", True) for name in say(y)]]


def grid(x: Tensor, x_adv: Tensor, captions: list[list[Caption]]) -> Image.Image:
    """Three rows of pictures with captions.

    Args:
        x: clean pixels (N, C, H, W) in [0, 1] on the CPU.
        x_adv: attacked pixels, alike.
        captions: for each row and column a text and whether it is right.
    """
    delta = x_adv - x
    magnify = 0.5 / delta.abs().max().clamp_min(1e-8).item()
    rows = [("clean", x), ("adversarial", x_adv), (f"difference\nx {magnify:.3g}", 0.5 + magnify * delta)]
    height = len(rows) * (_CELL + _CAPTION + _GAP) + _GAP
    canvas = Image.new("RGB", (_MARGIN + len(x) * (_CELL + _GAP), height), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (title, images) in enumerate(rows):
        top = _GAP + r * (_CELL + _CAPTION + _GAP)
        pen.text((_GAP, top + _CELL // 2 - 8), title, fill="black")
        for c, image in enumerate(images):
            left = _MARGIN + c * (_CELL + _GAP)
            canvas.paste(_cell(image), (left, top))
            text, right = captions[r][c]
            pen.text((left, top + _CELL), text[:15], fill="black" if right else "red")
    return canvas


def _cell(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    # Nearest neighbour, so that single attacked pixels stay visible.
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)
