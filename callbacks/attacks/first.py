"""The first image that fools the network, and which samples still look for one."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem

_LOOK_EVERY = 4
"""Steps between two looks where to look is to wait: an undefended network falls within a few."""
_WORTH = 0.25
"""Share of a batch that must be done there before it is cut: a smaller batch is hardly faster on a wide device."""


class First:
    """A walk that ends for each sample at its first iterate that fools the network, and else goes on.

    A sample that is done rests where it is. It leaves the batch, and costs nothing from then on: on the CPU after each step;
    on other devices, which have to wait for such a look, after every fourth, if a quarter of the batch or more is done.

    Args:
        problem: of all samples.
        start: where they begin, inside ball and box, (B, C, H, W).
        may_leave: whether samples may leave the batch; without it nothing is looked at, and so nothing waits.
    """

    def __init__(self, problem: Problem, start: Tensor, may_leave: bool) -> None:
        self.problem, self.x_adv, self.may_leave = problem, start, may_leave
        self._every, self._worth = (1, 0.0) if start.device.type == "cpu" else (_LOOK_EVERY, _WORTH)
        self._steps = 0
        self._all = start.clone()
        self._rows = torch.arange(len(start), device=start.device)
        self._standing = torch.ones(len(start), dtype=torch.bool, device=start.device)

    def step(self, logits: Tensor, ahead: Tensor) -> None:
        """Go to ``ahead`` (n, C, H, W), but not those that are broken at the iterate, by its ``logits`` (n, K)."""
        self._standing = self._standing & ~self.problem.fooled(logits)
        self.x_adv = torch.where(self._standing.view(-1, 1, 1, 1), ahead, self.x_adv)
        self._steps += 1

    def let_go(self, memory: dict[str, Tensor]) -> bool:
        """Let those leave that are done, if it is time; returns whether any sample is left.

        Args:
            memory: of the walk, a row a sample in each tensor; cut in place.
        """
        if not self.may_leave or self._steps % self._every:
            return True
        stays = self._standing.nonzero().squeeze(1)
        there = len(self._standing)
        if len(stays) == there or there - len(stays) < self._worth * there:
            return True
        self._all[self._rows] = self.x_adv
        self.problem, self.x_adv = self.problem.rows(stays), self.x_adv[stays]
        self._rows, self._standing = self._rows[stays], self._standing[stays]
        for key, value in memory.items():
            if value.dim() == 0 or len(value) != there:
                raise ValueError(
                    f"memory[{key!r}] of the walk has shape {tuple(value.shape)} for {there} samples: with keep='first' "
                    "samples leave, so keep one row a sample, or choose keep='best'"
                )
            memory[key] = value[stays]
        return len(stays) > 0

    def result(self) -> Tensor:
        """Where each sample is, (B, C, H, W)."""
        self._all[self._rows] = self.x_adv
        return self._all
