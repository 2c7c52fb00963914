"""What an attack sees while it runs: a classifier, a ball, a box, an objective, and a count of the passes spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...functional import geometry
from ...functional.geometry import Norm
from ...functional.gradients import input_gradient
from ...functional.losses import hard
from .draws import Draws

Classifier = Callable[[Tensor], Tensor]
RandomStart = bool | Literal["normal"]
_TRADES_START = 0.001
_SOFTMAX_TOLERANCE = 1e-4


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


@dataclass(frozen=True)
class Attacked:
    """What one call of an attack found and spent.

    Args:
        x_adv: adversarial pixels (B, C, H, W).
        forwards: forward passes, summed over samples.
        backwards: backward passes, summed over samples.
        start: the point of the first gradient, (B, C, H, W); None if no gradient was taken.
        first_logits: logits at ``start``, (B, K), in the attack's ``bn_mode``.
    """

    x_adv: Tensor
    forwards: int
    backwards: int
    start: Tensor | None = None
    first_logits: Tensor | None = None


class Problem:
    """The inner problem of one call: maximise ``objective(model(x_adv))`` inside the ball and the box.

    Args:
        model: maps pixels in [0, 1] to logits, already prepared.
        x: clean pixels (B, C, H, W), float32 or wider.
        y: labels (B,), or (B, K) if mixed.
        eps: radius, a number or (B, 1, 1, 1).
        norm: which ball.
        objective: what to maximise.
        draws: random numbers.
        dtype: what the network is fed with; the perturbation itself stays in the dtype of ``x``.
        careful: look at the values of the first logits and labels, which makes a GPU wait for them.
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
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.eps, self.norm, self.objective = eps, norm, objective
        self.draws, self.dtype, self.careful = draws, dtype, careful
        self.forwards = 0
        self.backwards = 0
        self.bad_gradient = torch.zeros((), dtype=torch.bool, device=x.device)
        self.start: Tensor | None = None
        self.first_logits: Tensor | None = None

    def logits(self, x_adv: Tensor) -> Tensor:
        """One forward pass without a graph: (B, C, H, W) -> (B, K)."""
        with torch.no_grad():
            return self._forward(x_adv)

    def gradient(self, x_adv: Tensor) -> Tensor:
        """Gradient of the objective at ``x_adv``: one forward and one backward pass."""
        gradient, logits = input_gradient(self._forward, x_adv, self.objective)
        self.backwards += len(x_adv)
        # The sign of NaN is 0, so a broken network would look robust.
        self.bad_gradient |= ~gradient.isfinite().all()
        if self.start is None:
            self.start, self.first_logits = x_adv.detach(), logits
        return gradient

    def project(self, x_adv: Tensor) -> Tensor:
        """Back into the ball and the box."""
        return geometry.project(x_adv, self.x, self.eps, self.norm)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Unit step of this norm along which the objective rises fastest."""
        return geometry.steepest(gradient, self.norm)

    def random_start(self, kind: RandomStart) -> Tensor:
        """Where to begin: ``x``, a random point of the ball, or (``normal``) TRADES' x + 0.001 * N(0, 1).

        linf: uniform in the ball. l2 and l1: a random direction times U(0, 1) * eps, the direction Gaussian for l2 and
        Laplacian for l1.
        """
        if not kind:
            return self.x
        if kind == "normal":
            return self.x + _TRADES_START * self.draws.normal(self.x)
        if self.norm == "linf":
            return self.project(self.x + self.eps * (2 * self.draws.uniform(self.x) - 1))
        direction = self.draws.normal(self.x)
        if self.norm == "l1":
            direction = direction.sign() * -torch.log1p(-self.draws.uniform(self.x))
        length = geometry.size(direction, self.norm).clamp_min(1e-12).view(-1, 1, 1, 1)
        radius = self.draws.uniform(self.x[:, :1, :1, :1]) * self.eps
        return self.project(self.x + radius * direction / length)

    def rows(self, mask: Tensor, draws: Draws) -> Problem:
        """The same problem for the samples that ``mask`` (B,) keeps, with other random numbers."""
        eps = self.eps[mask] if isinstance(self.eps, Tensor) and self.eps.dim() else self.eps
        return Problem(
            self.model,
            self.x[mask],
            self.y[mask],
            eps=eps,
            norm=self.norm,
            objective=self.objective.rows(mask),
            draws=draws,
            dtype=self.dtype,
            careful=False,
        )

    def _forward(self, x_adv: Tensor) -> Tensor:
        logits = self.model(x_adv.to(self.dtype))
        if not self.forwards:
            check_logits(logits, self.y, values=self.careful)
        self.forwards += len(x_adv)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_logits(logits: Tensor, y: Tensor, *, values: bool = True) -> None:
    """Refuse what is not a matrix of logits (B, K) for labels ``y``.

    Raises:
        TypeError: if the network returns no tensor.
        ValueError: if the shape is wrong, a label has no logit, or the values are probabilities.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the network returned a {type(logits).__name__}: an attack needs a tensor of logits (B, K)")
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"the network returned shape {tuple(logits.shape)} for {len(y)} samples: logits are (B, K)")
    if y.dim() == 2 and y.shape[1] != logits.shape[1]:
        raise ValueError(f"mixed labels have {y.shape[1]} classes and the logits {logits.shape[1]}: set num_classes")
    if not values:
        return
    if not hard(y).min() >= 0 or not hard(y).max() < logits.shape[1]:
        raise ValueError(
            f"labels run from {hard(y).min().item()} to {hard(y).max().item()} and the network has {logits.shape[1]} logits: "
            "labels must lie in [0, number of classes); check the data's labels and num_classes"
        )
    if looks_like_softmax(logits.detach()):
        raise ValueError(
            "the network's output sums to 1 and has no negative entry: it looks like softmax, whose gradients vanish "
            "where the network is sure; return logits instead"
        )


def looks_like_softmax(logits: Tensor) -> bool:
    """Whether every row of (B, K) is a probability vector."""
    if logits.shape[1] < 2:
        return False
    sums = logits.float().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() < _SOFTMAX_TOLERANCE).all())
