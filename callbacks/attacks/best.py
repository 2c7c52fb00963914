"""The best image found so far."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem


class Best:
    """The best image found so far for each sample: one that fools the network, else the one with the largest objective.

    Args:
        problem: whose samples they are.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x_adv = problem.x.clone()
        self.standing = torch.ones(len(problem.x), dtype=torch.bool, device=problem.x.device)
        self.value = torch.full((len(problem.x),), float("-inf"), device=problem.x.device, dtype=problem.x.dtype)

    def offer(self, x_adv: Tensor, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Keep each of ``x_adv`` that is better, and say which of them fool the network, bool (n,).

        The first image that fools a sample stays.

        Args:
            x_adv: candidates inside ball and box, (n, C, H, W).
            logits: of the network there, (n, K).
            rows: which samples they belong to, (n,); None means all.
        """
        rows = torch.arange(len(self.standing), device=x_adv.device) if rows is None else rows
        # Nothing is drawn here, and to cut the draws would make a GPU wait.
        part = self.problem if len(rows) == len(self.standing) else self.problem.rows(rows, self.problem.draws)
        fooled, value = part.fooled(logits), part.objective(logits).to(self.value.dtype)
        better = self.standing[rows] & (fooled | (value > self.value[rows]))
        self.x_adv[rows] = torch.where(better.view(-1, *[1] * (x_adv.dim() - 1)), x_adv, self.x_adv[rows])
        self.value[rows] = torch.where(better, value, self.value[rows])
        self.standing[rows] &= ~fooled
        return fooled
