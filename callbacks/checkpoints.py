"""The checkpoints of a run: the best one and the last one, and what is too large to lie in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from .monitors.compute import not_training
from .weights.averaging import WeightAverage

SIDE_FILES = "robust_pl_side_files"
"""In a checkpoint: names of the files beside it that belong to it."""
SIDE_FOLDER = "side_files"
"""Folder of the run that they lie in."""


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: that of the highest ``monitor`` so far. Complete at any moment, and found again in a moved folder.

    Args:
        folder: where it is kept.
        monitor: the logged metric that chooses.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(
            folder, "best", monitor=monitor, mode="max", auto_insert_metric_name=False, enable_version_counter=False
        )

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        waits = any(self.monitor.startswith(f"val_{average.name}/") for average in averages if not average.begun)
        # Until the average begins, it has no figure that could choose.
        if not waits or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        _replace_whole(super()._save_checkpoint, trainer, filepath)
        self._last_checkpoint_saved = filepath

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets the best score if the folder has another name, and a worse one would then take its place.
        old, new = str(state_dict["dirpath"]), str(self.dirpath)
        if old != new and Path(new, "best.ckpt").is_file():
            state_dict = {**state_dict, "dirpath": new}
            for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state_dict[key] = state_dict[key].replace(old, new, 1)
            state_dict["best_k_models"] = {k.replace(old, new, 1): v for k, v in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict)


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: that of the latest epoch, or of every so many steps. Complete at any moment.

    Args:
        folder: where it is kept.
        every_n_train_steps: None writes it at the end of epochs, and of the training.
        every_n_epochs: of which epochs.

    Raises:
        ValueError: if either is below 1.
    """

    def __init__(self, folder: Path, every_n_train_steps: int | None = None, every_n_epochs: int = 1) -> None:
        for field, value in (("save_every_n_steps", every_n_train_steps), ("save_every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"run.{field}={value} must be at least 1")
        super().__init__(
            folder,
            "last",
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs if every_n_train_steps is None else None,
            save_on_train_epoch_end=every_n_train_steps is None,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._every_n_train_steps < 1 and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        _replace_whole(super()._save_checkpoint, trainer, filepath)
        self._last_checkpoint_saved = filepath


def find_side_file(trainer: Trainer, name: str) -> Path:
    """Where a file lies that the checkpoint which a run resumes from names: in the run's folder, or beside the checkpoint.

    Raises:
        ValueError: if it is in neither.
    """
    folders = [Path(trainer.default_root_dir)]
    if trainer.ckpt_path is not None:
        folders += list(Path(trainer.ckpt_path).resolve().parents[:2])
    for folder in folders:
        if (path := folder / SIDE_FOLDER / name).is_file():
            return path
    raise ValueError(
        f"the checkpoint needs {SIDE_FOLDER}/{name}, which is not in {folders[0]}: copy the folder {SIDE_FOLDER} of its run "
        "there, or start a new run from its weights with --model.init_args.weights"
    )


def _replace_whole(save: Any, trainer: Trainer, filepath: str) -> None:
    """Write beside the old file and then take its name, so that a crash or a full disk leaves the old one intact.

    Side files that the old one alone named are then removed.
    """
    part, file = f"{filepath}.part", Path(filepath)
    with not_training(trainer):  # what is kept of each sample takes seconds to write
        save(trainer, part)
    if trainer.is_global_zero:
        no_longer = _side_files(file)
        os.replace(part, filepath)
        if no_longer:
            needed = [_side_files(other) for other in file.parent.glob("*.ckpt")]
            if None in needed:  # nobody knows what an unreadable one needs
                return
            for name in no_longer.difference(*needed):
                (Path(trainer.default_root_dir) / SIDE_FOLDER / name).unlink(missing_ok=True)


def _side_files(checkpoint: Path) -> set[str] | None:
    """Names of the side files of a checkpoint; None if that cannot be read."""
    if not checkpoint.is_file():
        return set()
    try:
        return set(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(SIDE_FILES, ()))
    except Exception:  # whatever a half-written or foreign file makes torch raise must not end a run that only replaces it
        return None
