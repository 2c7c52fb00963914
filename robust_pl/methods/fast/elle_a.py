"""ELLE-A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ..base import OptimizerFactory
from ..ranks import mean_over_ranks
from ..schedules import Schedule
from .elle import ELLE, TripleExample


class ELLEA(ELLE):
    """ELLE-A (Abad Rocamora et al. 2024, arXiv 2401.11618): ELLE whose weight rises when the loss stops being linear.

    The weight begins at 0. After each step, if the step's mean linearity error is above the mean of those of all steps before
    plus ``sensitivity`` times their (population) standard deviation, the weight becomes ``lmbda``, else ``decay`` times what it
    was. As in the authors' code a step is judged before it joins the history, and from the fourth one on; the public
    benchmark's joins first. The history is kept as its length and its moments, which are equal on all processes and part of
    the checkpoint, as the weight is; the log shows that as ``train/lmbda``. Cost: that of :class:`ELLE`.

    Args:
        lmbda: what the weight rises to; the authors take 4000 for every eps.
        sensitivity: in standard deviations.
        decay: of the weight in a step that is not above.
        net: see :class:`ELLE`, and so all others.

    Raises:
        ValueError: if an argument is out of its range.
    """

    current: Tensor
    seen: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 4000.0,
        sensitivity: float = 2.0,
        decay: float = 0.99,
        track_statistics: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, lmbda, track_statistics, optimizer, schedule, weights, num_classes)
        if sensitivity < 0:
            raise ValueError(f"sensitivity={sensitivity} must be at least 0")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} is what remains of the weight after a step: choose from [0, 1]")
        self.sensitivity, self.decay = sensitivity, decay
        self.register_buffer("current", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        # Squared deviations are summed up, not squares: those would leave nothing of a small spread.
        for name in ("mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def weight(self) -> Tensor:
        return self.current

    def after_step(self, example: TripleExample) -> None:
        error = mean_over_ranks(example.errors.to(self.mean.dtype).mean())
        limit = self.mean + self.sensitivity * (self.squares / self.seen.clamp_min(1)).sqrt()
        above = (self.seen > 2) & (error > limit)
        self.current.copy_(torch.where(above, self.lmbda, self.decay * self.current))
        before = error - self.mean
        self.seen += 1
        self.mean += before / self.seen
        self.squares += before * (error - self.mean)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("train/lmbda", self.current.clone())
