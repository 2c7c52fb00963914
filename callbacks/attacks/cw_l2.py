"""The L2 attack of Carlini and Wagner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional.losses import hard, margin
from .checks import Number, check_count, check_step_size
from .minimal import MinimalNormAttack
from .prepare import BNMode
from .problem import Problem

_SHRINK = 0.999999
_LARGEST_CONST = 1e10
_REPEAT_FROM = 10
_PROGRESS = 0.9999


@dataclass
class _Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on a batch; elementwise, so samples do not see each other."""

    mean: Tensor
    square: Tensor
    steps: int = 0

    def direction(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.mean = torch.lerp(gradient, self.mean, 0.9)
        self.square = torch.lerp(gradient * gradient, self.square, 0.999)
        return self.mean / (1 - 0.9**self.steps) / ((self.square / (1 - 0.999**self.steps)).sqrt() + 1e-8)

    def rows(self, mask: Tensor) -> _Adam:
        return _Adam(self.mean[mask], self.square[mask], self.steps)


class _Smallest:
    """The smallest image found so far for each sample, and whether this step of the search found any."""

    def __init__(self, problem: Problem) -> None:
        self.x_adv = problem.x.clone()
        self.size = torch.full_like(problem.x[:, 0, 0, 0], float("inf"))
        self.found = torch.zeros(len(problem.x), dtype=torch.bool, device=problem.x.device)

    def offer(self, rows: Tensor, x_adv: Tensor, size: Tensor, fooled: Tensor) -> None:
        better = fooled & (size < self.size[rows])
        self.x_adv[rows] = torch.where(better.view(-1, 1, 1, 1), x_adv, self.x_adv[rows])
        self.size[rows] = torch.where(better, size, self.size[rows])
        self.found[rows] |= fooled


class CWL2(MinimalNormAttack):
    """The L2 attack of Carlini and Wagner (2017, arXiv 1608.04644), a small perturbation by Adam and a search over c.

    Minimises ||x_adv - x||^2 + c * max(lead of the label, -kappa) over w with x_adv = (tanh(w) + 1) / 2, which stays in the
    box by itself. c is searched for each sample: times 10 until the network is fooled, then by bisection; with 10 or more
    search steps the last takes the smallest c that fooled. The smallest image met anywhere is returned. In float32 the
    start is x up to 1e-6, for atanh needs pixels inside the box.

    The paper takes 10000 steps for each of 9 values of c, cleverhans 1000 for each of 5, torchattacks 50 for c = 1 alone.
    The objective pulls towards the runner-up, whose boundary need not be the nearest; on a linear network the attack comes
    within 2 % of it. Adam's steps hide distances below about step_size: take a smaller one for very fragile networks. Unlike
    the authors' code, which stops a batch where the sum of its losses stalls, each sample stops by itself, and stopped ones
    are not passed on. None stops before Adam could have brought its mean pixel to grey, mean |w| / ``step_size`` steps: black
    and white pixels start where tanh is flat, and a loss that does not move yet looks like one that has settled.

    Cost at most: 1 + ``binary_search_steps`` * ``steps`` forward and one less backward passes; less with
    ``abort_early``.

    Args:
        eps: None, or a radius, see :class:`MinimalNormAttack`.
        steps: Adam's steps for each c.
        step_size: Adam's learning rate.
        binary_search_steps: values of c tried.
        initial_const: the first c.
        kappa: by how much the wrong logit must lead.
        abort_early: stop a sample whose loss fell by less than 0.01 % in a tenth of the steps.
        targeted: see :class:`Attack`, and so ``bn_mode`` and ``seed``, though nothing is drawn.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        eps: Number | Tensor | None = None,
        steps: int = 1000,
        step_size: Number = 0.01,
        *,
        binary_search_steps: int = 9,
        initial_const: float = 1e-3,
        kappa: float = 0.0,
        abort_early: bool = True,
        targeted: bool = False,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm="l2", targeted=targeted, bn_mode=bn_mode, seed=seed)
        check_count("steps", steps)
        check_count("binary_search_steps", binary_search_steps)
        if not 0 < initial_const <= _LARGEST_CONST:
            raise ValueError(f"initial_const={initial_const} must be above 0 and at most {_LARGEST_CONST:g}, such as 0.001")
        if not 0 <= kappa < float("inf"):
            raise ValueError(f"kappa={kappa} must be a finite number of at least 0")
        self.steps, self.step_size = steps, check_step_size(step_size)
        self.binary_search_steps, self.initial_const = binary_search_steps, initial_const
        self.kappa, self.abort_early = kappa, abort_early

    def find(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x.clone()
        rows = (~self._fooled(problem, problem.logits(x))).nonzero().squeeze(1)
        if len(rows):
            x_adv[rows] = self._search(problem.rows(rows))
        return x_adv

    def _search(self, problem: Problem) -> Tensor:
        """Look for the c of each sample; the smallest images that fooled, and clean ones where none did."""
        smallest = _Smallest(problem)
        const = torch.full_like(smallest.size, self.initial_const)
        lower, upper = torch.zeros_like(const), torch.full_like(const, float("inf"))
        for step in range(self.binary_search_steps):
            if step == self.binary_search_steps - 1 >= _REPEAT_FROM - 1:
                const = upper.clamp(max=_LARGEST_CONST)
            smallest.found.zero_()
            self._minimise(problem, const, smallest)
            upper = torch.where(smallest.found, torch.minimum(upper, const), upper)
            lower = torch.where(smallest.found, lower, torch.maximum(lower, const))
            const = torch.where(upper.isinf(), 10 * const, (lower + upper) / 2)
        return smallest.x_adv

    def _minimise(self, problem: Problem, const: Tensor, smallest: _Smallest) -> None:
        """Adam for one c a sample, (B,)."""
        rows = torch.arange(len(problem.x), device=problem.x.device)
        w = torch.atanh((2 * problem.x - 1) * _SHRINK)
        adam = _Adam(torch.zeros_like(w), torch.zeros_like(w))
        before = torch.full_like(const, float("inf"))
        patience = w.abs().mean((1, 2, 3)) / self.step_size
        for step in range(self.steps):
            tanh = w.tanh()
            x_adv = (tanh + 1) / 2
            gradient, logits = problem.gradient_and_logits(x_adv, lambda z, part=problem: self._lead(part, z))
            size = problem.size(x_adv)
            smallest.offer(rows, x_adv, size, self._fooled(problem, logits))
            gradient = 2 * (x_adv - problem.x) + const.view(-1, 1, 1, 1) * gradient
            w = w - self.step_size * adam.direction(gradient * (1 - tanh * tanh) / 2)
            if self.abort_early and step % max(1, self.steps // 10) == 0:
                loss = size * size + const * self._lead(problem, logits)
                goes_on = (loss <= _PROGRESS * before) | (step < patience)
                if not goes_on.any():
                    return
                if not goes_on.all():
                    problem, adam = problem.rows(goes_on), adam.rows(goes_on)
                    rows, w, const, patience, loss = (t[goes_on] for t in (rows, w, const, patience, loss))
                before = loss

    def _lead(self, problem: Problem, logits: Tensor) -> Tensor:
        """How far the network is from being fooled, and not below -kappa, (B,)."""
        lead = margin(logits, problem.y)
        return (lead if self.targeted else -lead).clamp(min=-self.kappa)

    def _fooled(self, problem: Problem, logits: Tensor) -> Tensor:
        """Whether the network is fooled by a lead of more than kappa, bool (B,)."""
        handicap = torch.zeros_like(logits).scatter(1, hard(problem.y).unsqueeze(1), self.kappa)
        return problem.fooled(logits - handicap if self.targeted else logits + handicap)
