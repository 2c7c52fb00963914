"""Weights and optimizer state of a moment that a run may go back to."""

from __future__ import annotations

from copy import deepcopy

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class Snapshot:
    """A copy of all weights, buffers and optimizer states, on their devices: as much memory as they take.

    Learning rates, schedules, random streams and the position in the data are not part of it: they go on.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self._weights = {k: v.detach().clone() for k, v in pl_module.state_dict().items() if isinstance(v, Tensor)}
        self._optimizers = [deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]

    @torch.no_grad()
    def restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, bit for bit."""
        for name, tensor in pl_module.state_dict().items():
            if name in self._weights:
                tensor.copy_(self._weights[name])
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=True):
            # Copied, since the optimizer would go on in these very tensors.
            optimizer.load_state_dict({"state": deepcopy(state), "param_groups": optimizer.state_dict()["param_groups"]})
