"""Class-wise errors of a training epoch, gathered step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional.fairness import class_means, class_sums


class ClassErrors(nn.Module):
    """Running sums of per-sample values by class, equal on all processes and kept in the checkpoint.

    Each :meth:`add` sums over processes at once, K x (C + 1) numbers, so that a run resumed in the middle of an epoch goes on
    with all that was seen. It costs no pass: give it losses that the step has anyway.

    Args:
        num_classes: number of classes K.
        columns: number of values C of a sample, such as 2 for the adversarial and the clean loss.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, columns))
        self.register_buffer("counts", torch.zeros(num_classes))

    def add(self, values: Tensor, y: Tensor) -> None:
        """Add a batch, on all processes.

        Args:
            values: (B, C), see :func:`robust_pl.functional.fairness.class_sums`.
            y: classes (B,), or shares (B, K).
        """
        sums, counts = class_sums(values, y, len(self.counts))
        both = torch.cat([sums, counts.unsqueeze(1)], 1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        self.sums += both[:, :-1]
        self.counts += both[:, -1]

    def means(self) -> Tensor:
        """Mean of each class and column (K, C); nan for a class that did not occur."""
        return class_means(self.sums, self.counts)

    def reset(self) -> None:
        """Forget all batches."""
        self.sums.zero_()
        self.counts.zero_()
