"""What an attack sees while it runs: a classifier, a ball, a box, an objective, and a count of the passes spent."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ...functional import geometry
from ...functional.geometry import Norm
from ...functional.gradients import input_gradient
from ...functional.losses import hard
from .checks import RandomStart, check_logits
from .draws import Draws
from .ledger import Ledger, Progress

Classifier = Callable[[Tensor], Tensor]
_TRADES_START = 0.001


@dataclass(frozen=True)
class Objective:
    """What an attack maximises: ``loss(logits, *given) -> (B,)``.

    Args:
        loss: a function of logits (B, K) and of the tensors in ``given``.
        given: tensors with one row a sample: labels, a teacher's logits, a reference output.
    """

    loss: Callable[..., Tensor]
    given: tuple[Tensor, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        return self.loss(logits, *self.given)

    def usable(self) -> Objective:
        """The same objective on tensors that autograd may save, which inference tensors are not."""
        return Objective(self.loss, tuple(t.clone() if t.is_inference() else t for t in self.given))

    def rows(self, mask: Tensor) -> Objective:
        """The same objective for the samples that ``mask`` (B,) keeps."""
        return Objective(self.loss, tuple(tensor[mask] for tensor in self.given))

    def copies(self, times: int) -> Objective:
        """The same objective for the whole batch so many times over."""
        if times == 1:
            return self
        return Objective(self.loss, tuple(t.repeat(times, *[1] * (t.dim() - 1)) for t in self.given))


class Problem:
    """The inner problem of one call: maximise ``objective(model(x_adv))`` inside the ball and the box.

    Every method that goes through the network also takes the whole batch several times over, ``torch.cat([a, b, ...])``,
    and counts it so. For some of the samples alone make a smaller problem with :meth:`rows`.

    Args:
        model: maps pixels in [0, 1] to logits, already prepared.
        x: clean pixels (B, C, H, W), float32 or wider.
        y: labels (B,), or (B, K) if mixed; the labels to reach if ``targeted``.
        eps: radius, a number or (B, 1, 1, 1).
        norm: which ball.
        objective: what to maximise.
        draws: random numbers.
        dtype: what the network is fed with; the perturbation itself stays in the dtype of ``x``.
        careful: look at the values of the first logits and labels, which makes a GPU wait for them.
        targeted: whether success is to reach ``y`` rather than to leave it.
        progress: who follows the call.
        asked: the same network in less time, through which all passes go.
    """

    def __init__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        eps: float | Tensor,
        norm: Norm,
        objective: Objective,
        draws: Draws,
        dtype: torch.dtype,
        careful: bool = True,
        targeted: bool = False,
        progress: Progress | None = None,
        asked: Classifier | None = None,
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.asked = model if asked is None else asked
        self.eps, self.norm, self.objective = eps, norm, objective
        self.draws, self.dtype, self.careful, self.targeted = draws, dtype, careful, targeted
        self.ids: Tensor | None = None
        self.given_start: Tensor | None = None
        # What fits into memory: attacks that look at samples from several places at once cut them so. Kept by rows().
        self.rows_at_once = len(x)
        self.ledger = Ledger(len(x), x.device, progress or Progress())

    def logits(self, x_adv: Tensor) -> Tensor:
        """One forward pass without a graph: (B, C, H, W) -> (B, K)."""
        with torch.no_grad():
            return self._forward(x_adv)

    def gradient(self, x_adv: Tensor, objective: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Gradient of the objective at ``x_adv``: one forward and one backward pass."""
        return self.gradient_and_logits(x_adv, objective)[0]

    def gradient_and_logits(self, x_adv: Tensor, objective: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Gradient of the objective at ``x_adv`` and the logits there: one forward and one backward pass.

        Args:
            x_adv: pixels (B, C, H, W), or the batch n times over, (nB, C, H, W).
            objective: maps the logits (nB, K) to one value each, (nB,); None takes the problem's own.
        """
        times = self._times(x_adv)
        kept = self.ledger.keep_graph and self.ledger.start is None and self.ids is None and times == 1
        objective = objective or self.objective.copies(times)
        gradient, logits = input_gradient(self._forward, x_adv, objective, keep_graph=kept)
        self.ledger.backwards.add(times, self.ids)
        # The sign of NaN is 0, so a broken network would look robust.
        self.ledger.bad_gradient |= ~gradient.isfinite().all()
        if self.ledger.start is None and self.ids is None and times == 1:
            self.ledger.start, self.ledger.first_logits, self.ledger.first_gradient = x_adv.detach(), logits, gradient
        return gradient, logits.detach()

    def jacobian(self, x_adv: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the logits ``classes`` (B, k), as (B, k, C, H, W), and all logits (B, K).

        Costs one forward and k backward passes.
        """
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._forward(x_adv)
            chosen = logits.gather(1, classes).sum(0)
            last = len(chosen) - 1
            rows = [torch.autograd.grad(value, x_adv, retain_graph=i < last)[0] for i, value in enumerate(chosen)]
        jacobian = torch.stack(rows, 1)
        self.ledger.backwards.add(len(chosen) * self._times(x_adv), self.ids)
        self.ledger.bad_gradient |= ~jacobian.isfinite().all()
        return jacobian, logits.detach()

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether each of (nB, K) is a success, bool (nB,): misclassified or, if targeted, classified as asked."""
        y = hard(self.y)
        hit = logits.argmax(1) == y.repeat(len(logits) // len(y))
        return hit if self.targeted else ~hit

    def project(self, x_adv: Tensor) -> Tensor:
        """Back into the ball and the box."""
        return geometry.project(x_adv, self.x, self.eps, self.norm)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Unit step of this norm along which the objective rises fastest."""
        return geometry.steepest(gradient, self.norm)

    def size(self, x_adv: Tensor) -> Tensor:
        """Size of each perturbation in this norm, (B,)."""
        return geometry.size(x_adv - self.x, self.norm)

    def random_start(self, kind: RandomStart) -> Tensor:
        """Where to begin: ``x``, a random point of the ball, or (``normal``) TRADES' x + 0.001 * N(0, 1), or
        (``bernoulli``) x plus or minus eps / 2 in each entry.

        linf: uniform in the ball. l2 and l1: a random direction times U(0, 1) * eps, the direction Gaussian for l2 and
        Laplacian for l1. Where the caller named a start, that one: it may lie outside of the box.
        """
        if self.given_start is not None:
            return self.given_start
        if not kind:
            return self.x
        if kind == "normal":
            return self.x + _TRADES_START * self.draws.normal(self.x)
        if kind == "bernoulli":
            return self.project(self.x + self.eps / 2 * (self.draws.uniform(self.x) - 0.5).sign())
        if self.norm == "linf":
            return self.project(self.x + self.eps * (2 * self.draws.uniform(self.x) - 1))
        direction = self.draws.normal(self.x)
        if self.norm == "l1":
            direction = direction.sign() * -torch.log1p(-self.draws.uniform(self.x))
        length = geometry.size(direction, self.norm).clamp_min(1e-12).view(-1, 1, 1, 1)
        radius = self.draws.uniform(self.x[:, :1, :1, :1]) * self.eps
        return self.project(self.x + radius * direction / length)

    def rows(self, rows: Tensor, draws: Draws | None = None) -> Problem:
        """The same problem for the samples that ``rows`` keeps, a mask (B,) or positions (n,).

        What it spends counts as spent by this one. Its random numbers go on where those of this one are, unless ``draws``
        are given.
        """
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        part = copy(self)
        part.x, part.y, part.objective = self.x[rows], self.y[rows], self.objective.rows(rows)
        part.eps = self.eps[rows] if isinstance(self.eps, Tensor) and self.eps.dim() else self.eps
        part.given_start = None if self.given_start is None else self.given_start[rows]
        part.draws = draws or self.draws.rows(rows)
        part.ids = rows if self.ids is None else self.ids[rows]
        part.careful = False
        return part

    def _times(self, x_adv: Tensor) -> int:
        times, rest = divmod(len(x_adv), len(self.x))
        if rest:
            raise ValueError(
                f"{len(x_adv)} images were passed for {len(self.x)} samples: pass the whole batch, once or several times "
                "over, or make a smaller problem with problem.rows(rows)"
            )
        return times

    def _forward(self, x_adv: Tensor) -> Tensor:
        times = self._times(x_adv)
        logits = self.asked(x_adv.to(self.dtype))
        if not self.ledger.checked:
            check_logits(logits, self.y.repeat(times, *[1] * (self.y.dim() - 1)), values=self.careful)
            self.ledger.checked = True
        self.ledger.forwards.add(times, self.ids)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
