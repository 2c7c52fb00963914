"""Record the weights that a fit goes through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor

from ...nets.trajectory import FOLDER


class WeightTrajectory(Callback):
    """Samples of the weights along a fit, for soups, trainable averages (TWA) and training in a subspace (Sub-AT).

    ``<run>/trajectory/NNNNN.safetensors`` holds the trainable parameters, in float32 at least, and the buffers of the module's
    state dict; frozen networks are left out. Files are written whole or not at all, by the first process, and their numbers go
    on when a run resumes. :func:`robust_pl.nets.read_trajectory` reads them. Cost: no pass; one copy of the weights on disk
    a sample.

    Args:
        times_per_epoch: samples an epoch, at equal distances, the last at its end; 0 for none. Li et al. 2022 take 2.
        at_start: whether the weights before the first step are sample 0.
        every_n_steps: take a sample after every so many optimizer steps, too.
        folder: where to write instead of the run's folder.

    Raises:
        ValueError: if an argument is out of range, or the folder holds another run's samples.
    """

    def __init__(
        self,
        times_per_epoch: int = 1,
        at_start: bool = True,
        every_n_steps: int | None = None,
        folder: str | None = None,
    ) -> None:
        if times_per_epoch < 0:
            raise ValueError(f"times_per_epoch={times_per_epoch} must be at least 0")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if not times_per_epoch and every_n_steps is None:
            raise ValueError("times_per_epoch=0 records nothing: set every_n_steps, or at least one sample an epoch")
        self.times_per_epoch, self.at_start, self.every_n_steps = times_per_epoch, at_start, every_n_steps
        self.folder = None if folder is None else Path(folder)
        self.samples = 0
        """How many were taken so far."""
        self._last = -1
        self._step = 0

    def path(self, trainer: Trainer) -> Path:
        """The folder of the samples."""
        return Path(trainer.default_root_dir) / FOLDER if self.folder is None else self.folder

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self._last = state_dict["samples"], state_dict["last"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"WeightTrajectory needs whole weights on one process, and {type(trainer.strategy).__name__} shards them: "
                "choose ddp"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self.path(trainer)
        there = sorted(file for file in folder.glob("*.safetensors") if file.stem.isdigit())
        fresh = self.samples == 0 and trainer.global_step == 0 and trainer.ckpt_path is None
        if fresh and there:
            raise ValueError(f"{folder} already holds the trajectory of another run: choose another folder, or remove it")
        # A resumed run takes again what was taken after its checkpoint.
        later = [file for file in there if int(file.stem) >= self.samples]
        if len(there) - len(later) < self.samples:
            rank_zero_warn(
                f"{folder} lacks samples from before the checkpoint: it will hold those of the rest of the run alone"
            )
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for file in later:
                file.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.times_per_epoch > 1 and trainer.num_training_batches == float("inf"):
            raise ValueError(f"times_per_epoch={self.times_per_epoch} needs to know how long an epoch is: use every_n_steps")
        self._step = trainer.global_step
        if self.at_start and trainer.global_step == 0 and self.samples == 0:
            self._take(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, length, times, every = batch_idx + 1, trainer.num_training_batches, self.times_per_epoch, self.every_n_steps
        before, self._step = self._step, trainer.global_step
        inside = times > 1 and done < length and done * times // length > batch_idx * times // length
        # A batch may make no step, or several.
        if inside or (every is not None and self._step // every > before // every):
            self._take(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.times_per_epoch:
            self._take(trainer, pl_module)

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        number, self.samples = self.samples, self.samples + 1
        if not trainer.is_global_zero:
            return
        parameters = {name: _kept(p) for name, p in pl_module.named_parameters() if p.requires_grad}
        every = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
        buffers = {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in pl_module.state_dict().items()
            if isinstance(tensor, Tensor) and name not in every
        }
        about = {
            "sample": str(number),
            "step": str(trainer.global_step),
            "epoch": str(trainer.current_epoch),
            "parameters": json.dumps(list(parameters)),  # in flat order, which safetensors does not keep
        }
        path = self.path(trainer) / f"{number:05d}.safetensors"
        part = path.with_suffix(".part")
        save_file({**parameters, **buffers}, part, about)
        os.replace(part, path)


def _kept(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to("cpu", wide).clone().contiguous()
