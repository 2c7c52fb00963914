"""Accuracy by class, counted exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassAccuracy(Metric):
    """Counts of right verdicts by class. Integer sums, so that any number of processes gives the same figures.

    Args:
        num_classes: number of classes K.
    """

    full_state_update = False
    higher_is_better = True

    right: Tensor
    total: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, right: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            right: verdict of each sample, bool (B,).
            y: class of each sample, int64 (B,).
        """
        self.right.index_add_(0, y, right.to(self.right.dtype))
        self.total.index_add_(0, y, torch.ones_like(y))

    def compute(self) -> Tensor:
        """Right verdicts and samples of each class, int64 (2, K)."""
        return torch.stack([self.right, self.total])
