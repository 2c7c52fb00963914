"""CR attack: walks towards a few classes that may leave the ball for a while, and are tested inside it."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from ...functional import geometry, losses
from ...functional.geometry import Norm
from ...functional.losses import hard
from .base import Attack
from .best import Best
from .checks import DEFAULT_EPS, Number, check_count
from .prepare import BNMode
from .problem import Objective, Problem

_SMALLEST = 0.05
"""Least share of eps that a step covers."""
_NEAR = 0.05
"""A margin below which another try is worth its passes, in units of logits."""


class CRAttack(Attack):
    """Constraint relaxation attack (Pan 2025, AAAI, "Efficient Robustness Evaluation via Constraint Relaxation") under linf.

    With the margin ``m = z_y - max_{k != y} z_k`` and ``m_t = z_y - z_t``, P_r the projection on the ball of radius r and the
    box, and thirds of a cycle (``c = cycle / 3``; 10 steps):

    1. Screening: from a random point, c steps ``x <- P_eps(x + eps / 2 sign grad CE)``, of eps / 4 in the middle. The
       ``n_targets`` largest wrong logits where it ends name the targets.
    2. For each target a walk from a new random point, in cycles with ``s = max(2^-n, 0.05)`` in the n-th:
       ``x <- P_r(x - eps s sign grad m_t)``. In the first third ``r = (1 + s) eps``, and after each step P_eps(x) is tested on
       the side; then ``r = eps``. At the end of the second third a sample with ``m_t > s`` gives this target up. The last third
       begins with ``P_{(1 - s) eps}(x) + U(-eps s, eps s)``.
    3. ``rounds - 1`` times more, from new points, the pairs of sample and target that came near in the round before: ``m`` on
       the side, or ``m_t`` of a later iterate, was below 0.05.

    ``x_adv`` is the first image found that fools the network, else the one of the smallest margin.

    About as strong as AutoAttack at a few per cent of its passes where gradients tell the truth; where they are masked it
    overestimates robustness, and by far (Pan and Yao 2026, arXiv 2604.22853). So it is for choosing between checkpoints, and
    AutoAttack is for the figure that is published. The bounds ``m_t > s`` and 0.05 are in units of logits: a tenth of the
    logits costs about four times the passes, and tenfold ones are given up sooner.

    Reconstructed from the public code (fzjcdt/constraint-relaxation-attack), with the same verdicts but for these: a sample
    that is misclassified counts as broken, and a tie of two logits only if the prediction differs, where that code takes each
    tie at the first random point as broken and never looks at x; an iterate that any class wins counts as found, not the
    target alone; a later round ends with its last target, not with the first that no standing sample is near; the random point
    and the end of the screening are not passed through again; random numbers belong to samples.

    Cost of a sample that stands, for T targets, 150 steps and cycles of 30: ``12 + 205 T`` forward and ``10 + 150 T`` backward
    passes (627 and 460 with ten classes) if it is near no target and gives none up; the second summands ``rounds`` times if it
    is near all; 31 and 20 for a target that is given up in the first cycle. One that is broken costs nothing from then on; on
    a GPU, which would have to wait, that is looked for at the end of each third.

    Args:
        eps: see :class:`Attack`.
        norm: ``linf``; what relaxing another ball should be was not published.
        n_targets: how many of the likeliest wrong classes are aimed at; None takes ceil(ln K) for K classes.
        rounds: how often a pair of sample and target is tried at most.
        steps: iterations of a walk.
        cycle: iterations with one size of step, a multiple of 6.
        bn_mode: see :class:`Attack`.
        seed: see :class:`Attack`.

    Raises:
        ValueError: if an argument is out of its range, or the network has too few classes for ``n_targets``.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        n_targets: int | None = None,
        rounds: int = 5,
        steps: int = 150,
        cycle: int = 30,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        if norm != "linf":
            raise ValueError(f"norm={norm!r}, and the constraint relaxation attack is made for linf alone: choose APGD")
        super().__init__(eps, norm=norm, random_start=True, bn_mode=bn_mode, seed=seed)
        for field, value in (("rounds", rounds), ("steps", steps), ("cycle", cycle)):
            check_count(field, value)
        if n_targets is not None:
            check_count("n_targets", n_targets)
        if cycle % 6:
            raise ValueError(f"cycle={cycle} must be a multiple of 6, such as 30: three thirds, one of them with a middle")
        self.n_targets, self.rounds, self.steps, self.cycle = n_targets, rounds, steps, cycle

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        judge = copy(problem)
        judge.objective = Objective(losses.margin, (y,))
        best = Best(judge)
        targets = self._screen(problem, best)
        near = torch.ones_like(targets, dtype=torch.bool)
        walks = self.rounds * targets.shape[1]
        for done in range(walks):
            round_, rank = divmod(done, targets.shape[1])
            if rank == 0:
                tried, near = near, torch.zeros_like(near)
            rows = (best.standing & tried[:, rank]).nonzero().squeeze(1)
            if len(rows):
                part = problem.rows(rows, problem.draws.fork(f"{round_} {rank}").rows(rows))
                part.objective = Objective(_lead, (part.y, targets[rows, rank]))
                self._walk(part, rows, best, near[:, rank], (done / walks, 1 / walks))
        return best.x_adv

    def _screen(self, problem: Problem, best: Best) -> Tensor:
        """A few steps up the cross-entropy; the targets of each sample where they end, (B, T), or its label if it is broken."""
        logits = problem.logits(problem.x)
        best.offer(problem.x, logits)
        targets = hard(problem.y).unsqueeze(1).repeat(1, self._number_of_targets(logits.shape[1]))
        rows = best.standing.nonzero().squeeze(1)
        part = problem.rows(rows, problem.draws.fork("screening").rows(rows))
        part.objective = Objective(losses.cross_entropy, (hard(part.y),))
        x_adv = part.random_start(True)
        for step in range(self.cycle // 3):
            if not len(rows):
                return targets
            gradient, logits = part.gradient_and_logits(x_adv)
            best.offer(x_adv, logits, rows)
            share = 0.25 if step == self.cycle // 6 else 0.5
            x_adv = part.project(x_adv + share * part.eps * part.steepest(gradient))
            if self._looks(step, x_adv):
                rows, part, x_adv = _those(best.standing[rows], rows, part, x_adv)
        if len(rows):
            logits = part.logits(x_adv)
            best.offer(x_adv, logits, rows)
            wrong = logits.scatter(1, hard(part.y).unsqueeze(1), float("-inf"))
            targets[rows] = wrong.argsort(dim=1, descending=True, stable=True)[:, : targets.shape[1]]
        return targets

    def _walk(self, part: Problem, rows: Tensor, best: Best, near: Tensor, share: tuple[float, float]) -> None:
        """Towards one target, whose lead over the label is the objective of ``part``, until nothing stands.

        Args:
            part: of the samples at ``rows`` (n,).
            rows: which of the samples of ``best`` they are.
            best: what is found goes there.
            near: whether each sample of ``best`` came near the target, bool (B,); written to.
            share: of the whole attack: what was done before, and what this walk adds.
        """
        third = self.cycle // 3
        x_adv = part.random_start(True)
        for step in range(self.steps):
            n, j = divmod(step, self.cycle)
            scale = max(0.5 ** (n + 1), _SMALLEST)
            if j == 2 * third:
                x_adv = _shaken(part, x_adv, scale)
            gradient, logits = part.gradient_and_logits(x_adv)
            lead = part.objective(logits)
            if j > third:
                near[rows] |= lead > -_NEAR
                best.offer(x_adv, logits, rows)
            radius = (1 + scale) * part.eps if j < third else part.eps
            x_adv = geometry.project(x_adv + scale * part.eps * part.steepest(gradient), part.x, radius, part.norm)
            if j <= third:
                inside = part.project(x_adv)
                logits = part.logits(inside)
                near[rows] |= losses.margin(logits, part.y) > -_NEAR
                best.offer(inside, logits, rows)
            if self._looks(step, x_adv):
                stays = best.standing[rows]
                if j == 2 * third - 1:
                    stays &= lead >= -scale
                rows, part, x_adv = _those(stays, rows, part, x_adv)
                if not len(rows):
                    return
                done = share[0] + share[1] * (step + 1) / self.steps
                part.ledger.progress.show(self.name or "cr", int(best.standing.sum()), done)

    def _looks(self, step: int, x_adv: Tensor) -> bool:
        """Whether those that are done leave after this step; on a GPU, where to look is to wait, at the ends of thirds only."""
        return x_adv.device.type == "cpu" or (step + 1) % (self.cycle // 3) == 0

    def _number_of_targets(self, classes: int) -> int:
        count = math.ceil(math.log(classes)) if self.n_targets is None else self.n_targets
        if count >= classes:
            raise ValueError(
                f"n_targets={count} is too many: the network has {classes} classes, so set n_targets to at most {classes - 1}"
            )
        return count


def _lead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """How far ``target`` (B,) is ahead of the label, -m_t, (B,)."""
    ahead, label = (logits.gather(1, which.unsqueeze(1)).squeeze(1) for which in (target, hard(y)))
    return ahead - label


def _shaken(part: Problem, x_adv: Tensor, scale: float) -> Tensor:
    """A random point of the ball at most ``scale * eps`` away from where ``x_adv`` lies in the ball that leaves room for it."""
    inner = geometry.project(x_adv, part.x, (1 - scale) * part.eps, part.norm)
    return part.project(inner + scale * part.eps * (2 * part.draws.uniform(inner) - 1))


def _those(keep: Tensor, rows: Tensor, part: Problem, x_adv: Tensor) -> tuple[Tensor, Problem, Tensor]:
    """The same walk for the samples in the mask ``keep`` (n,)."""
    return (rows, part, x_adv) if keep.all() else (rows[keep], part.rows(keep), x_adv[keep])
