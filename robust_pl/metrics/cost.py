"""What an attack cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class AttackCost(Metric):
    """Forward and backward passes per sample, and seconds. Seconds are those of the slowest process."""

    full_state_update = False

    forwards: Tensor
    backwards: Tensor
    samples: Tensor
    seconds: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("forwards", "backwards", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seconds", torch.zeros(()), dist_reduce_fx="max")

    def update(self, forwards: int, backwards: int, samples: int, seconds: float) -> None:
        """Add a call; passes are summed over its samples."""
        self.forwards += forwards
        self.backwards += backwards
        self.samples += samples
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Forward passes per sample, backward passes per sample, seconds: (3,)."""
        samples = self.samples.clamp_min(1)
        return torch.stack([self.forwards / samples, self.backwards / samples, self.seconds])
