"""FAB: the nearest point of the decision boundary, by projections on its linear approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional.geometry import Norm, size
from ...functional.losses import hard
from .checks import Number
from .fab_paths import Nearest, Paths, radius_of
from .minimal import MinimalNormAttack
from .prepare import BNMode
from .problem import Problem

_START = {"linf": 0.3, "l2": 1.0, "l1": 5.0}
"""Radius of random starts where neither eps nor an adversarial image found before gives one: that of the public code."""
_TINY = 1e-12
_SHOW_EVERY = 5


class FAB(MinimalNormAttack):
    """Fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044) under linf, l2 and l1.

    Each step linearises the difference of two logits, projects the iterate and the clean image onto the hyperplane where it
    vanishes (inside the box), and goes a little too far towards a mixture of both. A misclassified iterate is kept if it is
    the nearest so far, and pulled back towards the clean image. Nothing depends on step sizes, nor on the scale of the logits.

    FAB-T (``n_targets``) runs towards the classes that follow the label in the clean prediction: the first of them alone, then
    the others side by side. With a finite eps a sample is done as soon as an adversarial image inside the ball was found; with
    ``eps=None`` the search goes on to the nearest. No random numbers are drawn with ``restarts=1``.

    The iterates are those of the public code (fra31/auto-attack). Departures: weights of a hyperplane below 1e-8 count, see
    :func:`to_hyperplane`; all targets of a restart begin at the same random point; with ``eps=None`` that point lies at half
    the best distance so far, and at half of 0.3, 1 or 5 (linf, l2, l1) where there is none. And with a finite eps, FAB-T takes
    it for granted, fifteen times in sixteen, that a path outside the ball that has crossed the boundary again and again crosses
    once more and is to be pulled back: no image found there counts.

    Cost of a sample that is not broken: one forward pass, and per target and restart ``steps`` backward passes and 1 to 2
    times as many forward passes (1.1 with a finite eps): a step that is seen to cross the boundary costs a second one. FAB-T
    reckons from each path's past whether a step will cross, and takes the gradient in the same pass if not, which is wasted at
    times: a few per cent more backward passes. Untargeted: per restart 2 * ``steps`` forward and K * ``steps`` backward passes
    for K classes.

    Args:
        steps: number of steps of every path.
        n_targets: number of targets of FAB-T, at most K - 1; None is untargeted FAB, which goes to the nearest hyperplane.
        restarts: runs; those after the first begin at a random point, for samples that still stand.
        alpha_max: largest share of the clean image's projection in a step, in [0, 1].
        eta: how far a step goes, in lengths of the projection; above 1 crosses the boundary of a linear network.
        beta: what is left of a perturbation that was pulled back, in (0, 1).
        eps: see :class:`MinimalNormAttack`, and so all others.
    """

    def __init__(
        self,
        eps: Number | Tensor | None = None,
        *,
        norm: Norm = "linf",
        steps: int = 100,
        n_targets: int | None = 9,
        restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, bn_mode=bn_mode, seed=seed)
        for field, value in (("steps", steps), ("n_targets", n_targets), ("restarts", restarts)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field}={value} must be a whole number of at least 1")
        if not 0 <= alpha_max <= 1:
            raise ValueError(f"alpha_max={alpha_max} must lie in [0, 1], such as 0.1")
        if not 1 <= eta < float("inf"):
            raise ValueError(f"eta={eta} must be at least 1, such as 1.05: a shorter step stays this side of the boundary")
        if not 0 < beta < 1:
            raise ValueError(f"beta={beta} must lie between 0 and 1, such as 0.9")
        self.steps, self.n_targets, self.restarts = steps, n_targets, restarts
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta

    @property
    def is_random(self) -> bool:
        return self.restarts > 1

    def attempt(self, problem: Problem) -> Tensor:
        # Restarts happen inside, where the distances found so far are known.
        return self.perturb(problem, problem.x, problem.y).detach()

    def find(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        logits = problem.logits(x)
        nearest = Nearest(problem, problem.fooled(logits))
        groups, spent = self._groups(logits, hard(y)), 0
        for restart in range(self.restarts):
            start = x if restart == 0 else self._random_start(problem, nearest.distance, restart)
            for targets in groups:
                standing = nearest.standing.nonzero().squeeze(1)
                if not len(standing):
                    return nearest.x_adv
                paths = Paths(problem, standing, start, targets, classes=logits.shape[1])
                self._search(paths, nearest, spent)
                spent += paths.targets
        return nearest.x_adv

    def _groups(self, logits: Tensor, y: Tensor) -> list[Tensor | None]:
        """Targets (B, n) that run side by side: the runner-up, which breaks most of what can be broken, then all others.

        The groups must not depend on which samples are in the batch, or which of several adversarial images is found would.
        """
        if self.n_targets is None:
            return [None]
        classes = logits.shape[1]
        if self.n_targets > classes - 1:
            raise ValueError(
                f"n_targets={self.n_targets}, and of the network's {classes} classes only {classes - 1} can be targets of a "
                f"sample: set n_targets to {classes - 1} or less"
            )
        ranked = logits.scatter(1, y.unsqueeze(1), torch.inf).argsort(dim=1, descending=True, stable=True)
        targets = ranked[:, 1 : self.n_targets + 1]
        return [targets[:, :1], targets[:, 1:]] if self.n_targets > 1 else [targets]

    def _random_start(self, problem: Problem, distance: Tensor, restart: int) -> Tensor:
        """Half a radius away from x in a random direction; the radius is the best distance so far, or eps if smaller."""
        draws = problem.draws.fork(restart)
        direction = 2 * draws.uniform(problem.x) - 1 if self.norm == "linf" else draws.normal(problem.x)
        radius = torch.minimum(distance, radius_of(problem))
        radius = torch.where(radius.isfinite(), radius, _START[self.norm])
        length = radius / 2 / size(direction, self.norm).clamp_min(_TINY)
        return (problem.x + length.view(-1, 1, 1, 1) * direction).clamp(0, 1)

    def _search(self, paths: Paths, nearest: Nearest, spent: int) -> None:
        """All steps of some targets; ``spent`` targets were before them."""
        name, total = ("fab", self.restarts) if self.n_targets is None else ("fab-t", self.restarts * self.n_targets)
        paths.linearise()
        for step in range(self.steps):
            if step % _SHOW_EVERY == 0:
                done = (spent + paths.targets * step / self.steps) / total
                nearest.problem.ledger.progress.show(name, paths.samples, done)
            last = step == self.steps - 1
            paths.advance(self.alpha_max, self.eta)
            fooled = paths.cross(foresee=not last and self.n_targets is not None)
            standing = nearest.offer(paths, fooled)
            if last or not len(standing):
                return
            paths.pull_back(fooled, self.beta)
            paths.keep(standing)
            paths.linearise()
