"""The contract of every attack: a plain callable ``attack(model, x, y) -> x_adv`` that is also a Lightning callback."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ...functional import geometry, losses
from ...functional.geometry import NORMS, Norm
from ...functional.ratio import Ratio
from .draws import Draws, SampleDraws, StreamDraws, seed_from
from .prepare import BN_MODES, BNMode, prepared
from .problem import Objective, Problem, RandomStart

ObjectiveName = Literal["ce", "kl", "margin"]
Number = Ratio | float
OBJECTIVES = {"ce": losses.cross_entropy, "kl": losses.kl_divergence, "margin": losses.margin}
_BOX_TOLERANCE = 1e-6


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


class Attack(Callback, ABC):
    """Base of all attacks. A subclass defines :meth:`perturb`; everything around it happens here once.

    As a callable, ``attack(model, x, y)`` returns adversarial pixels. As a callback it is one of the evaluation attacks of a
    run: validation, test and predict report the accuracy under it. A method holds its training attack as an argument.

    Args:
        eps: radius of the ball in units of the pixel range [0, 1]: a number, ``"8/255"`` in YAML, or a tensor (B, 1, 1, 1).
        norm: ``linf``, ``l2`` or ``l1``.
        random_start: False starts at x; True at a random point of the ball; ``normal`` at x + 0.001 * N(0, 1) (TRADES).
        restarts: independent tries. Later ones run on the samples that still stand; each costs one more forward pass.
        targeted: ``y`` then is the label to reach. As an evaluation attack it aims at a random other class.
        objective: what is maximised: ``ce`` cross-entropy, ``kl`` the divergence from the clean prediction, ``margin`` the
            largest wrong logit minus the right one. None: the objective of the method that trains with the attack, else ``ce``.
        bn_mode: mode of the network while it is attacked, see :func:`prepare.prepared`.
        seed: of the attack's own random numbers.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name: str | None = None
    """Key of the metrics, ``acc_<name>``; the command line sets it to the key of the ``attacks`` map."""
    stages: tuple[str, ...] = ("validate", "test", "predict")
    """Where the callback takes part."""

    def __init__(
        self,
        eps: Number | Tensor = Ratio("8/255"),
        *,
        norm: Norm = "linf",
        random_start: RandomStart = False,
        restarts: int = 1,
        targeted: bool = False,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        _choose("norm", norm, NORMS)
        _choose("bn_mode", bn_mode, BN_MODES)
        if objective is not None:
            _choose("objective", objective, tuple(OBJECTIVES))
        if random_start not in (True, False, "normal"):
            raise ValueError(f"random_start={random_start!r} is unknown: choose True, False or 'normal'")
        if restarts < 1:
            raise ValueError(f"restarts={restarts} must be at least 1")
        if targeted and objective == "kl":
            raise ValueError("objective='kl' has no target to reach: choose 'ce' or 'margin', or targeted=False")
        self.eps = check_eps(eps, norm)
        self.norm: Norm = norm
        self.random_start: RandomStart = random_start
        self.restarts, self.targeted, self.objective = restarts, targeted, objective
        self.bn_mode: BNMode = bn_mode
        self.seed = seed
        self.calls = self.samples = self.forwards = self.backwards = 0
        self._violations: Tensor | None = None

    @abstractmethod
    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        """One try: return x_adv (B, C, H, W) inside the ball and the box.

        ``problem`` gives ``gradient(x_adv)``, ``logits(x_adv)``, ``steepest(gradient)``, ``project(x_adv)``,
        ``random_start(kind)``, ``eps`` and random ``draws``, and counts what is spent.
        """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, eps: Number | Tensor | None = None) -> Tensor:
        """Attack ``model``, which maps pixels in [0, 1] to logits.

        Args:
            model: left as it was: mode, gradients, statistics (unless ``bn_mode="train"``) and random streams.
            x: pixels (B, C, H, W) in [0, 1].
            y: labels (B,), or (B, K) if mixed; the labels to reach if ``targeted``.
            eps: radius for this call instead of the attack's own.

        Returns:
            x_adv (B, C, H, W): float32, or float64 if x is.

        Raises:
            ValueError: if x, y, eps or the network's output is not what an attack can work with.
        """
        return self.run(model, x, y, eps=eps).x_adv

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: Number | Tensor | None = None,
        objective: ObjectiveName | Objective | None = None,
        index: Tensor | None = None,
        rank: int = 0,
        careful: bool = True,
    ) -> Attacked:
        """Attack, and also say what was spent on the way.

        Args:
            model: see :meth:`__call__`; ``x``, ``y`` and ``eps`` likewise.
            x: pixels.
            y: labels.
            eps: radius.
            objective: the caller's inner objective, used where the attack names none.
            index: position of each sample in its data set (B,): the random numbers then belong to the samples, and do not
                depend on how they are batched. Without it every call goes on in the attack's own stream.
            rank: process, so that training starts differ between processes.
            careful: check now. False puts the checks of values off to :meth:`raise_if_violated`, so that a GPU need not wait.
        """
        self._check_shapes(x, y)
        radius = self.eps if eps is None else check_eps(eps, self.norm)
        if isinstance(radius, Tensor):
            radius = self._check_eps_tensor(radius, x)
        with prepared(model, self.bn_mode):
            # Inference tensors cannot be saved for backward, and bf16 arithmetic steps out of the ball.
            clean = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
            problem = Problem(
                model,
                clean,
                y.clone(),
                eps=radius,
                norm=self.norm,
                objective=Objective(losses.cross_entropy, (y,)),
                draws=self._draws(index, rank, restart=0, device=x.device),
                dtype=x.dtype,
                careful=careful,
            )
            self._verify("input", _outside_box(clean), careful, clean)
            problem.objective = self._objective(problem, objective)
            x_adv = self.perturb(problem, problem.x, problem.y).detach()
            if self.restarts > 1:
                x_adv = self._restart(problem, x_adv, index, rank)
            self._verify("result", _outside_box(x_adv), careful, x_adv)
            self._verify("ball", _outside_ball(x_adv - clean, radius, self.norm), careful, x_adv - clean)
        self.calls += 1
        self.samples += len(x)
        self.forwards += problem.forwards
        self.backwards += problem.backwards
        return Attacked(x_adv, problem.forwards, problem.backwards, problem.start, problem.first_logits)

    def raise_if_violated(self) -> None:
        """Report what calls with ``careful=False`` saw; makes the device wait once."""
        if self._violations is not None:
            seen = self._violations.tolist()
            self._violations = None
            for kind, bad in zip(_COMPLAINTS, seen, strict=True):
                if bad:
                    raise ValueError(_COMPLAINTS[kind].format(attack=type(self).__name__, found=""))

    def aim(self, y: Tensor, num_classes: int, index: Tensor) -> Tensor:
        """Labels that an evaluation passes to the attack: ``y``, or for a targeted attack a random other class, (B,)."""
        if not self.targeted:
            return y
        draws = SampleDraws((self.seed, "target"), index)
        shift = draws.uniform(torch.empty(len(y), 1, device=y.device)).squeeze(1) * (num_classes - 1)
        return (y + 1 + shift.long()) % num_classes

    # Lightning's side ------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """Position of the random stream and the passes spent so far."""
        return {key: getattr(self, key) for key in ("calls", "samples", "forwards", "backwards")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, value in state_dict.items():
            setattr(self, key, value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that somebody evaluates the attacks, also where the module is not one of ours."""
        from ..evaluation import RobustEvaluation

        RobustEvaluation.ensure(trainer)

    # What happens around perturb -------------------------------------------------------------------------------------

    def _draws(self, index: Tensor | None, rank: int, restart: int, device: torch.device) -> Draws:
        if index is not None:
            return SampleDraws((self.seed, self.name or type(self).__name__, restart), index)
        return StreamDraws(seed_from(self.seed, rank, self.calls, restart), device)

    def _objective(self, problem: Problem, callers: ObjectiveName | Objective | None) -> Objective:
        chosen = self.objective or callers or "ce"
        if isinstance(chosen, str):
            given = problem.logits(problem.x) if chosen == "kl" else problem.y
            chosen = Objective(OBJECTIVES[chosen], (given,))
        if not self.targeted:
            return chosen
        return Objective(lambda logits, *given: -chosen.loss(logits, *given), chosen.given)

    def _restart(self, problem: Problem, x_adv: Tensor, index: Tensor | None, rank: int) -> Tensor:
        """Try again where the attack failed; keep what fools the network, else what has the larger objective."""
        x_adv = x_adv.clone()
        logits = problem.logits(x_adv)
        standing, value = ~self._reached(logits, problem.y), problem.objective(logits)
        for restart in range(1, self.restarts):
            if not standing.any():
                break
            rows = standing.nonzero().squeeze(1)
            draws = self._draws(None if index is None else index[rows], rank, restart, problem.x.device)
            part = problem.rows(rows, draws)
            candidate = self.perturb(part, part.x, part.y).detach()
            logits = part.logits(candidate)
            reached, new = self._reached(logits, part.y), part.objective(logits)
            better = reached | (new > value[rows])
            x_adv[rows[better]] = candidate[better]
            value[rows] = torch.maximum(value[rows], new)
            standing[rows[reached]] = False
            problem.forwards += part.forwards
            problem.backwards += part.backwards
        return x_adv

    def _reached(self, logits: Tensor, y: Tensor) -> Tensor:
        hit = logits.argmax(1) == losses.hard(y)
        return hit if self.targeted else ~hit

    def _check_shapes(self, x: Tensor, y: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {what}: an attack needs float pixels (B, C, H, W) in [0, 1]")
        if not isinstance(y, Tensor) or y.dim() not in (1, 2) or len(y) != len(x):
            what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"y is {what} for {len(x)} samples: an attack needs labels (B,), or (B, K) if mixed")
        if y.dim() == 1 and y.dtype != torch.int64 or y.dim() == 2 and not y.is_floating_point():
            raise TypeError(f"y has dtype {y.dtype}: labels are int64 (B,), or float (B, K) if mixed")

    def _check_eps_tensor(self, eps: Tensor, x: Tensor) -> Tensor:
        if eps.dim() and eps.shape not in ((len(x), 1, 1, 1), (1, 1, 1, 1)):
            raise ValueError(f"eps has shape {tuple(eps.shape)}: per-sample eps for this batch is ({len(x)}, 1, 1, 1)")
        eps = eps.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return eps.expand(len(x), 1, 1, 1) if eps.dim() else eps

    def _verify(self, kind: str, bad: Tensor, careful: bool, found: Tensor) -> None:
        if careful:
            if bad:
                where = f" (values from {found.min().item():.4g} to {found.max().item():.4g})"
                raise ValueError(_COMPLAINTS[kind].format(attack=type(self).__name__, found=where))
            return
        if self._violations is None:
            self._violations = torch.zeros(len(_COMPLAINTS), dtype=torch.bool, device=bad.device)
        self._violations[list(_COMPLAINTS).index(kind)] |= bad


_COMPLAINTS = {
    "input": "{attack} was given images with values outside [0, 1] or NaN{found}: scale pixels to [0, 1] in the data, and put "
    "the normalisation into the network (robust_pl.nets.Normalize)",
    "result": "{attack} returned values outside [0, 1] or NaN{found}: end perturb() with problem.project(x_adv), and check "
    "that the network's gradients are finite",
    "ball": "{attack} left its ball{found}: end perturb() with problem.project(x_adv)",
}


def check_eps(eps: Number | Tensor, norm: Norm) -> Ratio | Tensor:
    """Refuse a radius that cannot be meant, and warn of one that hardly can.

    Raises:
        ValueError: if eps is negative, not finite, or above 1 for linf.
    """
    if isinstance(eps, Tensor):
        if not (torch.isfinite(eps).all() and (eps >= 0).all()) or (norm == "linf" and (eps > 1).any()):
            raise ValueError("eps holds values that are negative, NaN or above 1: pixels lie in [0, 1], so write 8/255")
        return eps
    eps = eps if isinstance(eps, Ratio) else Ratio(eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} must be a finite number of at least 0, such as 8/255")
    if norm == "linf" and eps > 1:
        meant = f": did you mean {eps:g}/255?" if eps <= 255 else ""
        raise ValueError(f"eps={eps} is above 1, and pixels lie in [0, 1]{meant}")
    if norm == "l2" and eps >= 8 and float(eps).is_integer():
        warnings.warn(
            f"eps={eps} is a very large l2 radius for pixels in [0, 1]: did you mean {eps:g}/255?", stacklevel=3
        )
    return eps


def check_step_size(step_size: Number | None) -> Ratio | None:
    """Refuse a step that does not move.

    Raises:
        ValueError: if step_size is not a finite number above 0.
    """
    if step_size is None:
        return None
    step_size = step_size if isinstance(step_size, Ratio) else Ratio(step_size)
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size={step_size} must be above 0, such as 2/255; leave it out for the default")
    return step_size


def _choose(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r} is unknown: choose one of {', '.join(choices)}")


def _outside_box(x: Tensor) -> Tensor:
    # A comparison with NaN is false, so "all inside" also asks for finite values.
    return ~((x >= -_BOX_TOLERANCE) & (x <= 1 + _BOX_TOLERANCE)).all()


def _outside_ball(delta: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    allowed = eps.flatten() if isinstance(eps, Tensor) else eps
    # Rounding of x + delta: one unit in the last place of 1 for linf, its sum over pixels for the others.
    slack = 1e-6 if norm == "linf" else 1e-6 + 1e-4 * allowed
    return (geometry.size(delta, norm) > allowed + slack).any()
