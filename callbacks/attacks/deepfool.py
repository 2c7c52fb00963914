"""DeepFool: the smallest perturbation by linearising the network again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import geometry
from ...functional.geometry import Norm
from ...functional.losses import hard
from .checks import Number, check_count, choose
from .minimal import MinimalNormAttack
from .prepare import BNMode
from .problem import Problem

_DUAL: dict[Norm, Norm] = {"l2": "l2", "linf": "l1"}
_LEAST = 1e-4


class DeepFool(MinimalNormAttack):
    """DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599), a small perturbation that crosses the decision boundary.

    Each step takes the network for linear, f_k the lead of class k over the label and w_k its gradient, and goes the way to
    the nearest boundary: |f_k| / ||w_k||_q along the steepest direction, with q dual to the norm. Steps add up, and
    (1 + overshoot) times their sum is tried, as in the authors' code (LTS4/DeepFool), until the prediction leaves ``y``;
    torchattacks stretches each step instead, and keeps the excess of every step. Unlike the authors' code this one keeps
    the image in the box, starts from the given label and not from the prediction, and gives back the clean image where
    ``steps`` did not suffice. It is an upper bound on the smallest perturbation.

    Cost at most: 1 + 2 * ``steps`` forward and ``candidates`` * ``steps`` backward passes; a sample stops once it fools,
    which takes 2 or 3 steps on most.

    Args:
        eps: None, or a radius, see :class:`MinimalNormAttack`.
        steps: most steps.
        overshoot: how much further than the estimated boundary.
        candidates: classes that are looked at, the label and those with the largest logits at the clean image.
        norm: ``l2`` or ``linf``.
        bn_mode: see :class:`Attack`, and so ``seed``, though nothing is drawn.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        eps: Number | Tensor | None = None,
        steps: int = 50,
        overshoot: float = 0.02,
        candidates: int = 10,
        *,
        norm: Norm = "l2",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("norm", norm, tuple(_DUAL))
        super().__init__(eps, norm=norm, bn_mode=bn_mode, seed=seed)
        check_count("steps", steps)
        if not 0 <= overshoot < float("inf"):
            raise ValueError(f"overshoot={overshoot} must be a finite number of at least 0, such as 0.02")
        if not isinstance(candidates, int) or candidates < 2:
            raise ValueError(f"candidates={candidates} must be at least 2: the label and a class to reach")
        self.steps, self.overshoot, self.candidates = steps, overshoot, candidates

    def find(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        logits = problem.logits(x)
        classes = self._classes(logits, hard(y))
        found = x.clone()
        rows = (~problem.fooled(logits)).nonzero().squeeze(1)
        delta = torch.zeros_like(x)[rows]
        for _ in range(self.steps):
            if not len(rows):
                break
            part = problem.rows(rows)
            x_adv = self._stretched(part, delta)
            delta = delta + self._step(part, x_adv, classes[rows])
            # What leaves the box has no effect, and would have to be walked back.
            delta = (part.x + delta).clamp(0.0, 1.0) - part.x
            x_adv = self._stretched(part, delta)
            fooled = part.fooled(part.logits(x_adv))
            found[rows[fooled]] = x_adv[fooled]
            rows, delta = rows[~fooled], delta[~fooled]
        return found

    def _classes(self, logits: Tensor, y: Tensor) -> Tensor:
        """The label first, then the most likely others, (B, k)."""
        others = logits.scatter(1, y.unsqueeze(1), float("-inf"))
        count = min(self.candidates, logits.shape[1]) - 1
        return torch.cat([y.unsqueeze(1), others.topk(count, dim=1).indices], 1)

    def _stretched(self, problem: Problem, delta: Tensor) -> Tensor:
        return (problem.x + (1 + self.overshoot) * delta).clamp(0.0, 1.0)

    def _step(self, problem: Problem, x_adv: Tensor, classes: Tensor) -> Tensor:
        """The smallest step that would fool a linear network, (B, C, H, W)."""
        jacobian, logits = problem.jacobian(x_adv, classes)
        values = logits.gather(1, classes)
        leads = (values[:, 1:] - values[:, :1]).abs()
        slopes = jacobian[:, 1:] - jacobian[:, :1]
        steepness = geometry.size(slopes.flatten(0, 1), _DUAL[self.norm]).view_as(leads)
        # A class that no pixel moves is out of reach, also where its logit ties with the label's.
        distances = torch.where(steepness > 0, leads / steepness, float("inf"))
        distance, nearest = distances.min(1)
        slope = slopes[torch.arange(len(slopes), device=slopes.device), nearest]
        # Where logits tie, a linear network asks for no step at all.
        distance = distance.clamp(min=_LEAST).nan_to_num(posinf=0.0)
        return distance.view(-1, 1, 1, 1) * problem.steepest(slope)
