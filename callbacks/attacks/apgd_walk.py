"""The walks of APGD: where its iterates are, what they have seen, and how they go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Self

import torch
from torch import Tensor

from .problem import Problem

_MOMENTUM = 0.75
_STEP_CUT, _SMALLEST_STEP = 1.5, 0.1
_FEWER = 0.95


class Walk(ABC):
    """Iterates of APGD on n images, a row each. Every tensor among its attributes has one row an image.

    Args:
        problem: of n images, with the loss as its objective.
        ids: which sample each row belongs to (n,), for the caller.
        start: where to begin (n, C, H, W), inside ball and box.
        eot_iter: gradients that are averaged in each step.
        looking: False if this walk only looks for a place of large loss, and nothing that it meets counts as found.
    """

    def __init__(self, problem: Problem, ids: Tensor, start: Tensor, eot_iter: int, looking: bool = True) -> None:
        self.problem, self.ids, self.eot_iter, self.looking = problem, ids, eot_iter, looking
        self.step = (problem.eps * start.new_ones(len(start), 1, 1, 1)).to(start.dtype)
        self.x_adv = self.x_prev = self.x_best = self.x_found = start
        self.gradient, logits = self._averaged(start)
        self.gradient_best = self.gradient
        self.value = self.best = problem.objective(logits).to(start.dtype)
        self.fooled = problem.fooled(logits) & looking

    @staticmethod
    @abstractmethod
    def windows(steps: int) -> dict[int, int]:
        """Number of the step after which the walk looks back -> how many steps it looks back on."""

    @abstractmethod
    def move(self) -> Tensor:
        """The next iterate."""

    @abstractmethod
    def look_back(self, window: int) -> None:
        """Adapt the step to what the last ``window`` steps have brought."""

    def advance(self, last: bool) -> None:
        """One step. The last one needs no gradient, and so costs one forward pass only."""
        problem = self.problem
        self.x_prev, self.x_adv = self.x_adv, self.move()
        if last:
            logits = problem.logits(self.x_adv)
        else:
            self.gradient, logits = self._averaged(self.x_adv)
        value = problem.objective(logits).to(self.best.dtype)
        if self.looking:
            fooled = problem.fooled(logits)
            # The first image found, or the last one where the network may change its mind.
            new = fooled & ~self.fooled if self.eot_iter == 1 else fooled
            self.x_found = torch.where(_column(new), self.x_adv, self.x_found)
            self.fooled = self.fooled | fooled
        better = value > self.best
        self.x_best = torch.where(_column(better), self.x_adv, self.x_best)
        self.gradient_best = torch.where(_column(better), self.gradient, self.gradient_best)
        self.best = torch.where(better, value, self.best)
        self.value = value

    def rows(self, keep: Tensor) -> Self:
        """The same walk for the images that the mask ``keep`` (n,) chooses."""
        rows = keep.nonzero().squeeze(1)
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[rows])
        part.problem = self.problem.rows(rows)
        return part

    def _averaged(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Mean gradient, and the logits of the last of the passes: the bookkeeping goes by those."""
        total, logits = self.problem.gradient_and_logits(x_adv)
        for _ in range(1, self.eot_iter):
            gradient, logits = self.problem.gradient_and_logits(x_adv)
            total = total + gradient
        return total / self.eot_iter if self.eot_iter > 1 else total, logits

    def _back_to_best(self, chosen: Tensor) -> None:
        """Go on from the best iterate where ``chosen`` (n,); the momentum still is that of the way here."""
        self.x_adv = torch.where(_column(chosen), self.x_best, self.x_adv)
        self.gradient = torch.where(_column(chosen), self.gradient_best, self.gradient)


class MomentumWalk(Walk):
    """linf and l2 (Croce and Hein 2020): steps with momentum, halved where the loss went up too seldom.

    Args:
        problem: see :class:`Walk`, and so ``ids``, ``start``, ``eot_iter``.
        rho: share of the steps of a window in which the loss must rise.
    """

    def __init__(self, problem: Problem, ids: Tensor, start: Tensor, eot_iter: int, rho: float) -> None:
        super().__init__(problem, ids, start, eot_iter)
        self.rho = rho
        self.step = 2 * self.step
        self.moving = False
        self.rises = torch.zeros_like(self.best)
        # The official code compares the first loss with an entry of its table that is still zero, instead of with the start.
        self.value = torch.zeros_like(self.best)
        self.best_before, self.cut = self.best, torch.ones_like(self.fooled)

    @staticmethod
    def windows(steps: int) -> dict[int, int]:
        """22 % of the steps, then 3 % less each time, down to 6 %."""
        window, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        ends, end = {}, window
        while end <= steps:
            ends[end] = window
            window = max(window - less, least)
            end += window
        return ends

    def move(self) -> Tensor:
        problem, momentum = self.problem, self.x_adv - self.x_prev
        ahead = problem.project(self.x_adv + self.step * problem.steepest(self.gradient))
        if not self.moving:
            return ahead
        return problem.project(self.x_adv + _MOMENTUM * (ahead - self.x_adv) + (1 - _MOMENTUM) * momentum)

    def advance(self, last: bool) -> None:
        before = self.value
        super().advance(last)
        self.moving = True
        self.rises = self.rises + (self.value > before)

    def look_back(self, window: int) -> None:
        stuck = ~self.cut & (self.best_before >= self.best)
        self.cut = (self.rises <= self.rho * window) | stuck
        self.best_before = self.best
        self.step = torch.where(_column(self.cut), self.step / 2, self.step)
        self.rises = torch.zeros_like(self.rises)
        self._back_to_best(self.cut)


class SparseWalk(Walk):
    """l1 (Croce and Hein 2021): steps in few pixels, as few as the best perturbation so far suggests, without momentum.

    Args:
        problem: see :class:`Walk`, and so ``ids``, ``start``, ``eot_iter``, ``looking``.
        drawn: whether ``start`` is a random point, and says nothing about how sparse a perturbation should be.
    """

    def __init__(self, problem: Problem, ids: Tensor, start: Tensor, eot_iter: int, looking: bool, drawn: bool) -> None:
        super().__init__(problem, ids, start, eot_iter, looking)
        self.pixels = start[0].numel()
        self.changed = self._count(start)
        self.density = self.changed / self.pixels / 1.5
        if drawn:
            self.changed, self.density = torch.full_like(self.changed, self.pixels), torch.full_like(self.density, 0.2)
        self.largest = self.step

    @staticmethod
    def windows(steps: int) -> dict[int, int]:
        """Always 4 % of the steps."""
        window = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(window, steps + 1, window), window)

    def move(self) -> Tensor:
        flat = self.gradient.flatten(1)
        rank = ((1 - self.density) * self.pixels).long().clamp(0, self.pixels - 1)
        threshold = flat.abs().sort(1).values.gather(1, rank.unsqueeze(1))
        signs = torch.where(flat.abs() >= threshold, flat.sign(), 0.0)
        direction = (signs / (signs.abs().sum(1, keepdim=True) + 1e-10)).view_as(self.x_adv)
        return self.problem.project(self.x_adv + self.step * direction)

    def look_back(self, window: int) -> None:
        changed = self._count(self.x_best)
        fewer = changed / self.changed.clamp_min(1) < _FEWER
        self.changed, self.density = changed, changed / self.pixels / 1.5
        shorter = (self.step / _STEP_CUT).maximum(_SMALLEST_STEP * self.largest)
        self.step = torch.where(_column(fewer), self.largest, shorter)
        self._back_to_best(fewer)

    def _count(self, x_adv: Tensor) -> Tensor:
        """How many entries differ from the clean image, as float32 (n,)."""
        return (x_adv != self.problem.x).flatten(1).sum(1).float()


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
