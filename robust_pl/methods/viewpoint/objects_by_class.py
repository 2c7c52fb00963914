"""Random objects of a class."""

from __future__ import annotations

import torch
from torch import Tensor


class ObjectsByClass:
    """Which of N objects each class has. Classes without objects do not count.

    Args:
        labels: class of each object, int64 (N,).
    """

    def __init__(self, labels: Tensor) -> None:
        labels = labels.cpu()
        present, group, self._count = labels.unique(return_inverse=True, return_counts=True)
        self.classes = len(present)
        self._group = group
        self._order = group.argsort(stable=True)
        self._first = self._count.cumsum(0) - self._count
        self._place = torch.empty_like(group)
        self._place[self._order] = torch.arange(len(group)) - self._first[group[self._order]]

    def of_class(self, group: Tensor, number: Tensor) -> Tensor:
        """An object of the class number ``group`` (M,) of ``classes``, by numbers (M,) from U[0, 1); int64 (M,)."""
        return self._order[self._first[group] + (number * self._count[group]).long()]

    def another(self, which: Tensor, number: Tensor) -> Tensor:
        """Another object of the class of each of ``which`` (M,), by numbers (M,) from U[0, 1); itself where it is alone."""
        group = self._group[which]
        count = self._count[group]
        further = 1 + (number * (count - 1)).long()
        return self._order[self._first[group] + (self._place[which] + further) % count]
