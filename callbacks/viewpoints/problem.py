"""What a search for viewpoints asks: the loss of objects seen from anywhere, counted, with the worst view kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...scenes.scene_set import SceneSet
from ...scenes.view_space import ViewSpace
from ..attacks.checks import check_logits
from .draws import ObjectDraws

WORST = ("worst_fitness", "worst_u", "worst_loss", "worst_prediction")


class Seen(NamedTuple):
    """What the network says of views of N objects, S each.

    Args:
        fitness: what the attack maximises, (N, S): the cross-entropy of the label, or minus that of the target.
        loss: cross-entropy of the label, (N, S).
        prediction: class, int64 (N, S).
    """

    fitness: Tensor
    loss: Tensor
    prediction: Tensor


class ViewProblem:
    """Objects before a classifier, as a search sees them: unbounded numbers u in, fitness out. Nothing has a gradient.

    Args:
        model: maps pixels in [0, 1] to logits; in eval mode.
        scenes: the N objects.
        labels: their classes, int64 (N,).
        space: what u means.
        draws: random numbers of the objects.
        batch_size: views rendered and shown to the network at once, of one or several objects.
        target: classes to reach, int64 (N,); None leads away from the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: SceneSet,
        labels: Tensor,
        space: ViewSpace,
        draws: ObjectDraws,
        batch_size: int,
        target: Tensor | None = None,
    ) -> None:
        first = next(model.parameters(), None)
        self.device = draws.device
        self.dtype = torch.float32 if first is None else first.dtype
        self.model, self.scenes, self.space, self.draws, self.batch_size = model, scenes, space, draws, batch_size
        self.labels = labels.to(self.device)
        self.target = None if target is None else target.to(self.device)
        self.renders = 0
        n = len(scenes)
        self.worst_fitness = torch.full((n,), -torch.inf, device=self.device)
        self.worst_u = torch.zeros(n, space.dim, device=self.device)
        self.worst_loss = torch.zeros(n, device=self.device)
        self.worst_prediction = torch.zeros(n, dtype=torch.int64, device=self.device)

    @property
    def ids(self) -> list[str]:
        """Names of the objects."""
        return self.scenes.ids

    def part(self, rows: list[int]) -> ViewProblem:
        """The problem of some of the objects alone."""
        scenes = self.scenes.subset(rows)
        draws = ObjectDraws(self.draws.key, scenes.ids, self.device)
        target = None if self.target is None else self.target[rows]
        return ViewProblem(self.model, scenes, self.labels[rows], self.space, draws, self.batch_size, target)

    @torch.no_grad()
    def check(self) -> None:
        """Look at one view, so that what cannot be attacked is told before any work starts.

        Raises:
            TypeError: if the network returns no tensor.
            ValueError: if a label or a target has no logit, or the output are no logits.
        """
        which, view = torch.zeros(1, dtype=torch.int64, device=self.device), self.space.squash(self.worst_u[:1])
        logits = self.model(self.images(which, view).to(self.dtype))
        check_logits(logits, self.labels[:1], values=False)
        for what, given in (("label", self.labels), ("target", self.target)):
            for name, value in zip(self.ids, [] if given is None else given.tolist(), strict=False):
                if not 0 <= value < logits.shape[1]:
                    raise ValueError(
                        f"the {what} of object {name!r} is {value} and the network has {logits.shape[1]} logits: it must lie "
                        f"in [0, {logits.shape[1]})"
                    )
        check_logits(logits, self.labels[:1])

    def images(self, which: Tensor, view: Tensor) -> Tensor:
        """Pixels (M, 3, H, W) of objects ``which`` (M,) from viewpoints (M, 6)."""
        # A pose in half precision would be off by degrees.
        with torch.autocast(self.device.type, enabled=False):
            return self.scenes.images(which, self.space.to_matrix(view.float()))

    def look(self, u: Tensor) -> Seen:
        """Render every object from its views u (N, S, D), a batch at a time, and ask the network."""
        n, count = u.shape[:2]
        u = u.to(self.device)
        if not count:
            nothing = torch.zeros(n, 0, device=self.device)
            return Seen(nothing, nothing, nothing.long())
        which = torch.arange(n, device=self.device).repeat_interleave(count)
        views = self.space.squash(u).flatten(0, 1)
        parts = [self._ask(*part) for part in zip(which.split(self.batch_size), views.split(self.batch_size), strict=True)]
        seen = Seen(*(torch.cat(column).view(n, count) for column in zip(*parts, strict=True)))
        self.renders += n * count
        self._keep_worst(u, seen)
        return seen

    def fitness(self, u: Tensor) -> Tensor:
        """What is to be maximised, (N, S), at views u (N, S, D)."""
        return self.look(u).fitness

    def now(self) -> float:
        """Seconds, after the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def _ask(self, which: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(self.images(which, view).to(self.dtype))
        logits, labels = logits.float(), self.labels[which]
        loss = F.cross_entropy(logits, labels, reduction="none")
        aim = loss if self.target is None else -F.cross_entropy(logits, self.target[which], reduction="none")
        return aim, loss, logits.argmax(1)

    def _keep_worst(self, u: Tensor, seen: Seen) -> None:
        best, place = seen.fitness.max(1)
        rows = torch.arange(len(u), device=self.device)
        better = best > self.worst_fitness
        self.worst_fitness = torch.where(better, best, self.worst_fitness)
        self.worst_u = torch.where(better.unsqueeze(1), u[rows, place], self.worst_u)
        self.worst_loss = torch.where(better, seen.loss[rows, place], self.worst_loss)
        self.worst_prediction = torch.where(better, seen.prediction[rows, place], self.worst_prediction)

    def state(self) -> dict[str, Tensor]:
        """What is remembered of the views so far, so that an interrupted search can go on."""
        return {name: getattr(self, name) for name in WORST} | {"renders": torch.tensor(self.renders)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        for name in WORST:
            setattr(self, name, state[name].to(self.device))
        self.renders = int(state["renders"])
