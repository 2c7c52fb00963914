"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .averaging import Buffers, WeightAverage


class EMA(WeightAverage):
    """Exponential moving average of the weights, as robust training uses it (Gowal et al. 2020, arXiv 2010.03593; Wang et al.
    2023, arXiv 2302.04638).

    After each optimizer step ``average <- d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``, where
    n counts the averaged steps before this one, so that the first weights are soon forgotten. Wang et al. use decay 0.995 and
    a warm-up of 2.5 % of the steps with ``buffers: copy``; FGSM-LAW (Jia et al. 2024, arXiv 2308.11443) 0.999, none, and
    ``average``. The FastAT benchmark (Pan and Yao 2026, arXiv 2604.22853) takes 0.9995 at once, from the weights after the
    first step, and ``average``: ``ramp: false, warmup: 1``; first weights and statistics are then forgotten within some 2,000
    steps. A method may veto an update, see ``Method.averaging_weight``; n then counts the accepted ones. Where a batch makes
    several optimizer steps, the average moves once after it, by the share that many steps would have moved it.
    Costs no pass over the network, and two reads and one write of all weights a step.

    Args:
        decay: in [0, 1), the limit of d.
        warmup: steps before the average begins, or their share of all steps where it is a fraction below 1: until then there
            is no average to evaluate, and it begins as a copy of the weights.
        buffers: BatchNorm's statistics, see :class:`WeightAverage`.
        batches: for ``buffers`` ``method`` and ``clean``, training batches of each process.
        name: of the average, where there are several.
        ramp: whether d rises to ``decay`` as above; False takes ``decay`` from the first averaged step on.

    Raises:
        ValueError: if decay, warmup, buffers, batches or name is out of its range, or the warm-up is a share of steps whose
            number is unknown.
    """

    def __init__(
        self,
        decay: float = 0.999,
        warmup: int | float = 0,
        buffers: Buffers = "average",
        batches: int = 100,
        name: str = "ema",
        ramp: bool = True,
    ) -> None:
        super().__init__(name, buffers, batches)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup={warmup} must be a number of steps, or their share of all steps, in [0, 1)")
        self.decay, self.warmup, self.ramp = decay, warmup, ramp
        self._updates: int | Tensor = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = int(self.warmup)
        if 0 < self.warmup < 1:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError(f"warmup={self.warmup} is a share of all steps: set trainer.max_epochs, or give steps")
            self._first = round(self.warmup * steps)
        self._begin_if_due(trainer, pl_module)

    def update(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        if not self.begun:
            self._begin_if_due(trainer, pl_module)
            return
        accepted = pl_module.averaging_weight() if hasattr(pl_module, "averaging_weight") else None
        if accepted is None:
            kept = 1.0
            for n in range(self._updates, self._updates + steps):
                kept *= min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay
            self._updates += steps
            self.move(1 - kept)
            return
        n = torch.as_tensor(self._updates, dtype=torch.float64, device=accepted.device)
        kept = torch.ones_like(n)
        for step in range(steps):
            kept = kept * (((1 + n + step) / (10 + n + step)).clamp(max=self.decay) if self.ramp else self.decay)
        self._updates = n + steps * accepted
        self.move((accepted * (1 - kept)).to(torch.float32))

    def progress(self) -> dict[str, Any]:
        return {"updates": int(self._updates)}

    def load_progress(self, progress: dict[str, Any]) -> None:
        self._updates = progress["updates"]

    def _begin_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.begun and trainer.global_step >= self._first:
            self.begin(trainer, pl_module)
