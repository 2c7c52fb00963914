"""APGD: projected gradient ascent that sets its own step sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from ...functional import losses
from ...functional.geometry import Norm, size
from .apgd_walk import MomentumWalk, SparseWalk, Walk
from .autoattack_checks import warn_of_zero_gradients
from .base import Attack
from .checks import DEFAULT_EPS, Number, check_count, choose
from .draws import Draws
from .prepare import BNMode
from .problem import Objective, Problem

APGDLoss = Literal["ce", "dlr", "dlr-targeted"]
LOSSES: tuple[str, ...] = ("ce", "dlr", "dlr-targeted")
_STAGES = (3.0, 2.0, 1.0)
# Steps between two looks for broken samples: a GPU would have to wait for each.
_GLANCE = {"cpu": 1, "cuda": 8}


class APGD(Attack):
    """Auto-PGD (Croce and Hein 2020, arXiv 2003.01690); under l1 that of Croce and Hein (2021, arXiv 2103.01208).

    Starts at random on the sphere (l1: at a projected Gaussian point), and adapts the size of its steps, for l1 also in how
    many pixels they go, to how the loss has risen. ``x_adv`` is the first image found that fools the network, else the one of
    the largest loss.

    Cost of a sample that stands: ``restarts * (steps + 1)`` forward and ``restarts * steps`` backward passes, times
    ``n_targets`` and one forward pass more with ``dlr-targeted``; two more forward passes a run with ``use_largereps``.
    ``eot_iter`` multiplies all but the last forward pass of a run. A sample that is broken costs nothing from then on; on a
    GPU, which would have to wait, that is looked for every eight steps.

    It does what the public code of AutoAttack does, its oddities that change results included: the first loss counts as a
    rise where it is positive, and under ``eot_iter`` the loss and the verdict are those of the last pass alone. It departs
    where verdicts do not change: samples that are broken leave (not under ``eot_iter``, where a network may change its
    mind), random numbers belong to samples, no gradient is taken of the last iterate, targets are ranked on the wrong
    classes once, and after the likeliest target all others run side by side, all restarts of a target not in a row.

    Args:
        eps: see :class:`Attack`.
        norm: see :class:`Attack`.
        loss: ``ce`` cross-entropy, ``dlr`` difference of logits ratio, ``dlr-targeted`` that towards each of ``n_targets``
            classes, whichever class is reached in the end.
        steps: iterations of a run.
        restarts: random starts, each on the samples that still stand.
        n_targets: how many of the likeliest wrong classes ``dlr-targeted`` aims at.
        rho: share of steps in which the loss must rise for the step size to stay.
        eot_iter: gradients that are averaged in each step, for networks that are random.
        use_largereps: for l1: three tenths of the steps at 3 * eps and at 2 * eps come first.
        bn_mode: see :class:`Attack`.
        seed: see :class:`Attack`.

    Raises:
        ValueError: if an argument is out of its range, or the network has too few classes for ``loss`` or ``n_targets``.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        loss: APGDLoss = "ce",
        steps: int = 100,
        restarts: int = 1,
        n_targets: int = 9,
        rho: float = 0.75,
        eot_iter: int = 1,
        use_largereps: bool = False,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, random_start=True, restarts=restarts, bn_mode=bn_mode, seed=seed)
        choose("loss", loss, LOSSES)
        for field, value in (("steps", steps), ("n_targets", n_targets), ("eot_iter", eot_iter)):
            check_count(field, value)
        if not 0 < rho <= 1:
            raise ValueError(f"rho={rho} must lie in (0, 1], such as 0.75")
        if use_largereps and (norm != "l1" or steps < 3):
            raise ValueError(f"use_largereps=True needs norm='l1' and steps of at least 3, not norm={norm!r}, steps={steps}")
        self.loss: APGDLoss = loss
        self.steps, self.n_targets, self.rho, self.eot_iter = steps, n_targets, rho, eot_iter
        self.use_largereps = use_largereps

    def attempt(self, problem: Problem) -> Tensor:
        """All tries; they are those of :meth:`perturb`, which knows already what each has found."""
        return self.perturb(problem, problem.x, problem.y).detach()

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        found = _Found(problem)
        rounds = self._rounds(problem)
        for done, (targets, draws) in enumerate(rounds):
            copies = len(draws)
            width = max(1, problem.rows_at_once // copies)
            standing = found.standing.nonzero().squeeze(1)
            for ids in standing.split(width) if len(standing) else ():
                start = self._start(problem, ids, draws)
                ids = ids.repeat(copies)
                part = problem.rows(ids)
                part.objective = self._objective_of(part.y, None if targets is None else targets[ids, _ranks(ids, copies)])
                self._run(part, ids, copies, start, found, (done / len(rounds), 1 / len(rounds)))
        return found.x_adv

    def _rounds(self, problem: Problem) -> list[tuple[Tensor | None, list[Draws]]]:
        """What runs side by side: the targets (B, copies) or None, and random numbers for each of the copies."""
        if self.loss != "dlr-targeted":
            return [(None, [problem.draws.fork(restart)]) for restart in range(self.restarts)]
        targets = self._targets(problem)
        # The likeliest class breaks most, so that few samples need the others.
        groups = [group for group in (range(1), range(1, self.n_targets)) if group]
        return [
            (targets[:, group.start : group.stop], [problem.draws.fork(f"{restart} {rank}") for rank in group])
            for restart in range(self.restarts)
            for group in groups
        ]

    def _targets(self, problem: Problem) -> Tensor:
        """The likeliest wrong classes of each clean image, (B, n_targets)."""
        logits = problem.logits(problem.x)
        losses.check_classes(self.loss, logits, 4)
        if self.n_targets >= logits.shape[1]:
            raise ValueError(
                f"n_targets={self.n_targets} is too many: the network has {logits.shape[1]} classes, so set n_targets to at "
                f"most {logits.shape[1] - 1}"
            )
        return logits.scatter(1, losses.hard(problem.y).unsqueeze(1), float("-inf")).topk(self.n_targets, dim=1).indices

    def _objective_of(self, y: Tensor, target: Tensor | None) -> Objective:
        if target is not None:
            return Objective(losses.dlr_targeted, (y, target))
        return Objective(losses.cross_entropy if self.loss == "ce" else losses.dlr, (y,))

    def _start(self, problem: Problem, ids: Tensor, draws: list[Draws]) -> Tensor:
        """Random points for the samples ``ids``, one set of them for each of ``draws``; not yet projected."""
        part, x = problem.rows(ids), problem.x[ids]
        starts = []
        for source in draws:
            source = source.rows(ids)
            delta = 2 * source.uniform(x) - 1 if self.norm == "linf" else source.normal(x)
            if self.norm != "l1":
                delta = part.eps * delta / (size(delta, self.norm).view(-1, 1, 1, 1) + 1e-12)
            starts.append(x + delta)
        return torch.cat(starts)

    def _run(self, part: Problem, ids: Tensor, copies: int, start: Tensor, found: _Found, share: tuple[float, float]) -> None:
        """From the start to the end, or until nothing stands; ``share`` is what is done before, and what this run adds."""
        begin, span = share
        glance = _GLANCE.get(start.device.type, 8)
        taken = 0
        for walk, steps in self._walks(part, ids, start):
            windows = walk.windows(steps)
            if self.loss != "ce":
                warn_of_zero_gradients(walk.gradient)
            for step in range(steps + 1):
                if step:
                    walk.advance(last=step == steps)
                if walk.looking and self.eot_iter == 1 and step % glance == 0:
                    walk = found.release(walk, copies)
                    if not len(walk.ids):
                        return
                    part.ledger.progress.show(self.name or "apgd", int(found.standing.sum()), begin + span * taken / self.steps)
                if step in windows:
                    walk.look_back(windows[step])
                taken += step > 0
        found.offer(walk, copies)

    def _walks(self, part: Problem, ids: Tensor, start: Tensor) -> Iterator[tuple[Walk, int]]:
        """The walks of a run, each from where the one before has found its largest loss, and their numbers of steps."""
        if self.norm != "l1":
            yield MomentumWalk(part, ids, part.project(start), self.eot_iter, self.rho), self.steps
            return
        if not self.use_largereps:
            yield SparseWalk(part, ids, part.project(start), self.eot_iter, looking=True, drawn=True), self.steps
            return
        early = math.ceil(0.3 * self.steps)
        for factor, steps in zip(_STAGES, (early, early, self.steps - 2 * early), strict=True):
            stage = copy(part)
            stage.eps = factor * part.eps
            walk = SparseWalk(stage, ids, stage.project(start), self.eot_iter, looking=factor == 1, drawn=False)
            yield walk, steps
            start = walk.x_best


class _Found:
    """What APGD has found for each sample: an image that fools the network, else the one of the largest loss."""

    def __init__(self, problem: Problem) -> None:
        self.x_adv = problem.x.clone()
        self.value = problem.x.new_full((len(problem.x),), float("-inf"))
        self.standing = torch.ones(len(problem.x), dtype=torch.bool, device=problem.x.device)

    def release(self, walk: Walk, copies: int) -> Walk:
        """Take down samples of which any copy fools the network; return the walk of those that stand."""
        broken = walk.fooled.view(copies, -1).any(0).repeat(copies)
        if not broken.any():
            return walk
        self.offer(walk.rows(broken), copies)
        return walk.rows(~broken)

    def offer(self, walk: Walk, copies: int) -> None:
        """Keep the best copy of each sample if it is better than what is known."""
        count = len(walk.ids) // copies
        score = torch.where(walk.fooled, float("inf"), walk.best).view(copies, count)
        rows = score.argmax(0) * count + torch.arange(count, device=score.device)
        ids, fooled, value = walk.ids[rows], walk.fooled[rows], walk.best[rows]
        image = torch.where(fooled.view(-1, 1, 1, 1), walk.x_found[rows], walk.x_best[rows])
        better = fooled | (value > self.value[ids])
        self.x_adv[ids] = torch.where(better.view(-1, 1, 1, 1), image, self.x_adv[ids])
        self.value[ids] = torch.where(better, value, self.value[ids])
        self.standing[ids] &= ~fooled


def _ranks(ids: Tensor, copies: int) -> Tensor:
    """Which of the copies each row is."""
    return torch.arange(copies, device=ids.device).repeat_interleave(len(ids) // copies)
