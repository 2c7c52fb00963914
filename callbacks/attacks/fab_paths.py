"""What FAB moves: one iterate for each sample and target, and the nearest adversarial images found on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional.geometry import Norm, size
from ...functional.hyperplane import to_hyperplane
from ...functional.losses import hard
from .problem import Problem

_DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
_TINY = 1e-12
_STILL = 1e-8
_UNSEEN = 15


def radius_of(problem: Problem) -> Tensor:
    """``problem.eps`` of each sample, (B,)."""
    return torch.as_tensor(problem.eps, device=problem.x.device, dtype=problem.x.dtype).reshape(-1).expand(len(problem.x))


class Nearest:
    """The nearest adversarial image of each sample so far.

    Args:
        problem: whose samples they are.
        fooled: samples that are misclassified as they are, bool (B,): at distance 0.
    """

    def __init__(self, problem: Problem, fooled: Tensor) -> None:
        self.problem, self.x_adv, self.radius = problem, problem.x.clone(), radius_of(problem)
        self.distance = torch.where(fooled, 0.0, torch.full_like(self.radius, torch.inf))

    @property
    def standing(self) -> Tensor:
        """Samples for which the search goes on, bool (B,): nothing found inside the ball, or the ball is all there is."""
        open_end = self.radius.isinf() & (self.distance > 0)
        return (self.radius > 0) & (open_end | (self.distance > self.radius))

    def offer(self, paths: Paths, fooled: Tensor) -> Tensor:
        """Keep what is nearer, and say which of the paths' samples go on: positions among them (n,)."""
        sizes = size(paths.x - self.problem.x[paths.sample], self.problem.norm)
        sizes, which = torch.where(fooled, sizes, torch.inf).view(-1, paths.samples).min(0)
        sample = paths.sample[: paths.samples]
        nearer = sizes < self.distance[sample]
        found = paths.x[which * paths.samples + torch.arange(paths.samples, device=which.device)]
        self.x_adv[sample] = torch.where(nearer.view(-1, 1, 1, 1), found, self.x_adv[sample])
        self.distance[sample] = torch.where(nearer, sizes, self.distance[sample])
        return self.standing[sample].nonzero().squeeze(1)


class Paths:
    """Iterates that run side by side, one for each sample and target: targets times samples, the samples fastest.

    Each knows the hyperplane at which its network, seen from there, changes its mind: ``gap + <normal, z - x> = 0``.

    Args:
        problem: the whole one.
        rows: its samples that take part, (n,).
        start: where they begin, (B, C, H, W).
        targets: classes to go to (B, k); None goes to the nearest hyperplane of all.
        classes: how many there are.
    """

    def __init__(self, problem: Problem, rows: Tensor, start: Tensor, targets: Tensor | None, classes: int) -> None:
        self.problem, self.classes = problem, classes
        self.samples, self.targets = len(rows), 1 if targets is None else targets.shape[1]
        self.sample = rows.repeat(self.targets)
        self.target = None if targets is None else targets[rows].T.flatten()
        self.x = start[self.sample]
        self.normal = torch.zeros_like(self.x)
        self.gap = self.x.new_zeros(len(self.x))
        self.known = torch.zeros_like(self.sample, dtype=torch.bool)
        self.crossed = torch.zeros_like(self.sample)
        # How often a step crossed the boundary less how often it did not, after one that did not and after one that did.
        self.unseen = torch.zeros_like(self.sample)
        self.habit = torch.ones(len(self.x), 2, dtype=torch.int64, device=self.x.device)

    def keep(self, which: Tensor) -> None:
        """Go on with the samples at ``which`` (n,) alone."""
        if len(which) == self.samples:
            return
        rows = torch.arange(len(self.x), device=which.device).view(-1, self.samples)[:, which].flatten()
        self.samples = len(which)
        for field in ("sample", "target", "x", "normal", "gap", "known", "crossed", "unseen", "habit"):
            if getattr(self, field) is not None:
                setattr(self, field, getattr(self, field)[rows])

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows (m,) in parts that are no larger than the batch that the caller of the attack chose."""
        return rows.split(self.problem.rows_at_once) if len(rows) else ()

    def linearise(self) -> None:
        """Find the hyperplanes that are not known yet."""
        self._take_gradients((~self.known).nonzero().squeeze(1))

    def _take_gradients(self, rows: Tensor) -> Tensor:
        """One forward and one backward pass (untargeted: K) at ``rows``, and whether they fool the network."""
        fooled = []
        for part in self.chunks(rows):
            problem = self.problem.rows(self.sample[part], self.problem.draws)
            if self.target is None:
                normal, gap, logits = self._nearest_hyperplane(problem, self.x[part])
            else:
                normal, gap, logits = self._hyperplane_to(self.target[part], problem, self.x[part])
            self.normal[part], self.gap[part] = normal, gap.to(self.gap.dtype)
            fooled.append(problem.fooled(logits))
        self.known[rows] = True
        return torch.cat(fooled) if fooled else self.known[:0]

    def _hyperplane_to(self, target: Tensor, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normal and gap of the hyperplane between the label and ``target`` (m,), and the logits at x."""

        def lead(logits: Tensor) -> Tensor:
            return (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, hard(problem.y).unsqueeze(1))).squeeze(1)

        normal, logits = problem.gradient_and_logits(x, lead)
        return normal, lead(logits), logits

    def _nearest_hyperplane(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for whichever class has the nearest hyperplane, as seen without the box."""
        y, row = hard(problem.y), torch.arange(len(x), device=x.device)
        jacobian, logits = problem.jacobian(x, torch.arange(self.classes, device=x.device).expand(len(x), -1))
        normals, gaps = jacobian - jacobian[row, y].unsqueeze(1), logits - logits[row, y].unsqueeze(1)
        steepness = size(normals.flatten(0, 1), _DUAL[problem.norm]).view_as(gaps)
        distance = (gaps.abs() / (steepness + _TINY)).scatter(1, y.unsqueeze(1), torch.inf)
        nearest = distance.argmin(1)
        return normals[row, nearest], gaps[row, nearest], logits

    def advance(self, alpha_max: float, eta: float) -> None:
        """One step of every path."""
        norm, batch = self.problem.norm, self.problem.rows_at_once
        parts = (values.split(batch) for values in (self.x, self.sample, self.normal, self.gap))
        for x_part, sample, normal, gap in zip(*parts, strict=True):
            x, clean, normal = x_part.flatten(1), self.problem.x[sample].flatten(1), normal.flatten(1)
            gaps = torch.stack([gap, gap + (normal * (clean - x)).sum(1)])
            deltas = to_hyperplane(torch.stack([x, clean]), normal, gaps, norm)
            near, far = size(deltas.flatten(0, 1), norm).clamp_min(_STILL).view(2, -1)
            alpha = (near / (near + far)).clamp(max=alpha_max).unsqueeze(1)
            x = torch.lerp(x + eta * deltas[0], clean + eta * deltas[1], alpha)
            x_part.copy_(x.clamp_(0, 1).view_as(x_part))

    def cross(self, foresee: bool) -> Tensor:
        """Which of the paths fool the network where they are now, bool (m,).

        The gradient there is of use only if they do not. So with ``foresee`` it is taken in the same pass for the paths that
        are expected not to, by the habit of each: some cross at every step, some at every second one. Paths outside the ball
        that are expected to cross are taken to have crossed, and looked at every sixteenth time only: what is found there is
        too large to count, and it only decides whether the path is pulled back.
        """
        habit = self.habit.gather(1, self.crossed.unsqueeze(1)).squeeze(1)
        expected = habit >= 0 if foresee else torch.ones_like(self.known)
        unseen = (habit > 1) & self._outside() & (self.unseen < _UNSEEN) if foresee else torch.zeros_like(self.known)
        fooled = unseen.clone()
        for part in self.chunks((expected & ~unseen).nonzero().squeeze(1)):
            problem = self.problem.rows(self.sample[part], self.problem.draws)
            fooled[part] = problem.fooled(problem.logits(self.x[part]))
        self.known = torch.zeros_like(self.known)
        rest = (~expected).nonzero().squeeze(1)
        fooled[rest] = self._take_gradients(rest)
        habit = torch.where(unseen, habit, (habit + 2 * fooled - 1).clamp(-2, 2)).unsqueeze(1)
        self.habit = self.habit.scatter(1, self.crossed.unsqueeze(1), habit)
        self.unseen = torch.where(unseen, self.unseen + 1, 0)
        self.crossed = fooled.long()
        return fooled

    def _outside(self) -> Tensor:
        """Which paths are outside the ball, bool (m,); none if there is no ball."""
        radius = radius_of(self.problem)[self.sample]
        return size(self.x - self.problem.x[self.sample], self.problem.norm) > radius

    def pull_back(self, fooled: Tensor, beta: float) -> None:
        """Move the paths that crossed the boundary back towards their clean images."""
        rows = fooled.nonzero().squeeze(1)
        clean = self.problem.x[self.sample[rows]]
        self.x[rows] = clean + beta * (self.x[rows] - clean)
        self.known &= ~fooled
