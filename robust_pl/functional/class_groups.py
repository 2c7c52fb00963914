"""Logits of groups of classes: how a network of many classes is measured on a set that has fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Pool = Literal["highest", "mean"]


class ClassGroups:
    """Turns the logits of K classes into those of G groups of them.

    - ``highest``: the highest logit in the group. With one class a group that is ``logits[:, classes]``, as ImageNet-A and -R
      are measured; with several, the class that wins among all members is said to be its group.
    - ``mean``: log of the mean probability of the members, where the probabilities are those among all K classes, as Geirhos et
      al. 2019 (arXiv 1811.12231) map ImageNet's classes to sixteen.

    Both are differentiable, so that attacks see what is measured.

    Args:
        groups: numbers of the classes of each group.
        pool: how a group's logit comes from those of its members.

    Raises:
        ValueError: if there is no group, a group is empty, or a number lies below 0.
    """

    def __init__(self, groups: Sequence[Sequence[int]], pool: Pool = "highest") -> None:
        if not groups or not all(groups) or min(map(min, groups)) < 0:
            raise ValueError("groups must hold at least one group, each of at least one class from 0 upwards")
        if pool not in get_args(Pool):
            raise ValueError(f"pool={pool!r} is unknown: choose one of {', '.join(get_args(Pool))}")
        self.groups, self.pool = [list(group) for group in groups], pool
        self.needed = max(map(max, groups)) + 1
        size = max(map(len, groups))
        with torch.inference_mode(False):  # tensors of inference mode cannot take part in an attack's gradients
            self._members = torch.tensor([[*group, *[group[0]] * (size - len(group))] for group in self.groups])
            self._missing = torch.tensor([[i >= len(group) for i in range(size)] for group in self.groups])
            self._log_sizes = torch.tensor([len(group) for group in self.groups]).log()

    def __len__(self) -> int:
        return len(self.groups)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, G) of logits (B, K).

        Raises:
            ValueError: if the network has fewer classes than the groups name.
        """
        if logits.dim() != 2 or logits.shape[1] < self.needed:
            raise ValueError(
                f"the network gives logits {tuple(logits.shape)} and the test set is measured on groups of at least "
                f"{self.needed} classes: test a network that was trained on all of them, such as one of ImageNet's 1,000"
            )
        if self._members.device != logits.device:
            with torch.inference_mode(False):
                moved = [part.to(logits.device) for part in (self._members, self._missing, self._log_sizes)]
            self._members, self._missing, self._log_sizes = moved
        if self.pool == "highest":
            members = logits[:, self._members]
            return members.squeeze(2) if members.shape[2] == 1 else members.amax(2)
        members = logits.log_softmax(1)[:, self._members].masked_fill(self._missing, -torch.inf)
        return members.logsumexp(2) - self._log_sizes
