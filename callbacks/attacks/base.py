"""The contract of every attack: a plain callable ``attack(model, x, y) -> x_adv`` that is also a Lightning callback."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ...functional import losses
from ...functional.geometry import NORMS, Norm, size
from ...functional.gradients import compiled_parts, refuse_compiled
from ...nets.folding import Folded
from ...nets.graphed import Graphed
from ..evaluation import RobustEvaluation
from ..outcome import EvaluationAttack
from .best import Best
from .checks import (
    COMPLAINTS,
    DEFAULT_EPS,
    RANDOM_STARTS,
    Number,
    RandomStart,
    check_eps,
    check_kl,
    check_shapes,
    choose,
    outside_ball,
    outside_box,
    per_sample_eps,
)
from .draws import Draws, SampleDraws, StreamDraws, seed_from
from .ledger import Attacked, Progress
from .prepare import BN_MODES, BNMode, prepared
from .problem import Classifier, Objective, Problem

ObjectiveName = Literal["ce", "ce_hard", "kl", "margin"]
OBJECTIVES = {
    "ce": losses.cross_entropy,
    "ce_hard": losses.hard_cross_entropy,
    "kl": losses.kl_divergence,
    "margin": losses.margin,
}


class Attack(EvaluationAttack):
    """Base of all attacks. A subclass defines :meth:`perturb`; everything around it happens here once.

    As a callable, ``attack(model, x, y)`` returns adversarial pixels. As a callback it is one of the evaluation attacks of a
    run: validation, test and predict report the accuracy under it. A method holds its training attack as an argument.

    Args:
        eps: radius of the ball in units of the pixel range [0, 1]: a number, ``"8/255"`` in YAML, or a tensor (B, 1, 1, 1).
        norm: ``linf``, ``l2`` or ``l1``.
        random_start: False starts at x; True at a random point of the ball; ``normal`` at x + 0.001 * N(0, 1) (TRADES);
            ``bernoulli`` at x plus or minus eps / 2 in each entry (linf alone).
        restarts: independent tries. Later ones run on the samples that still stand; each costs one more forward pass.
        targeted: ``y`` then is the label to reach. As an evaluation attack it aims at a random other class.
        objective: what is maximised: ``ce`` cross-entropy, ``ce_hard`` the same with mixed or smoothed labels taken as their
            largest entry, ``kl`` the divergence from the clean prediction, ``margin`` the largest wrong logit minus the right
            one. None: the objective of the method that trains with the attack, else ``ce``.
        bn_mode: mode of the network while it is attacked, see :func:`prepare.prepared`.
        seed: of the attack's own random numbers.

    Raises:
        ValueError: if an argument is out of its range.
    """

    per_sample: bool = True
    """Whether the outcome for a sample depends on that sample alone; False where samples of a batch learn from each other."""
    takes_start: bool = False
    """Whether :meth:`run` may be told where to begin."""
    fold_batchnorm: bool = True
    """Whether a network in eval mode is attacked with BatchNorm folded in, see :class:`robust_pl.nets.folding.Folded`."""
    channels_last: bool = True
    """Whether it is shown images with channels last."""
    cuda_graphs: bool = False
    """Whether its passes in eval mode are replayed as CUDA graphs, see :class:`robust_pl.nets.graphed.Graphed`."""
    stays_within: float = 1.0
    """How far from x the result may lie, in units of eps. Above 1 the attack is one for training alone."""

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        random_start: RandomStart = False,
        restarts: int = 1,
        targeted: bool = False,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("norm", norm, NORMS)
        choose("bn_mode", bn_mode, BN_MODES)
        if objective is not None:
            choose("objective", objective, tuple(OBJECTIVES))
        if random_start not in RANDOM_STARTS:
            raise ValueError(f"random_start={random_start!r} is unknown: choose True, False, 'normal' or 'bernoulli'")
        if random_start == "bernoulli" and norm != "linf":
            raise ValueError(f"random_start='bernoulli' is a corner of a cube and norm is {norm!r}: choose True")
        if restarts < 1:
            raise ValueError(f"restarts={restarts} must be at least 1")
        if objective == "kl":
            check_kl(random_start, targeted)
        if restarts > 1 and not random_start:
            warnings.warn(
                f"restarts={restarts} with random_start=False tries the same {restarts} times: set random_start=True",
                stacklevel=3,
            )
        self.eps = check_eps(eps, norm)
        self.norm: Norm = norm
        self.random_start: RandomStart = random_start
        self.restarts, self.targeted, self.objective = restarts, targeted, objective
        self.bn_mode: BNMode = bn_mode
        self.seed = seed
        self.calls = self.samples = self.forwards = self.backwards = 0
        self._violations: Tensor | None = None

    @property
    def is_random(self) -> bool:
        """Whether the result depends on ``seed``; attacks that draw numbers elsewhere than for their start override it."""
        return bool(self.random_start)

    @abstractmethod
    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        """One try: return x_adv (B, C, H, W) inside the ball and the box.

        ``problem`` gives ``gradient(x_adv)``, ``logits(x_adv)``, ``steepest(gradient)``, ``project(x_adv)``,
        ``random_start(kind)``, ``fooled(logits)``, ``eps`` and random ``draws``, ``rows(standing)`` for a smaller problem,
        and counts what is spent.
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
        progress: Progress | None = None,
        start: Tensor | None = None,
        keep_graph: bool = False,
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
            careful: look at values now. False puts that off to :meth:`raise_if_violated`, so that a GPU need not wait, and
                leaves out labels and softmax, which a method looks at on its first batch.
            progress: keeps finished parts of a long attack and shows how far it is.
            start: where to begin instead of at the attack's own start, pixels (B, C, H, W) that may lie outside of the box.
            keep_graph: return the logits at the start with their graph, weights included, so that a training loss can use
                the same forward pass. A compiled network is refused.
        """
        check_shapes(x, y)
        radius = self.eps if eps is None else check_eps(eps, self.norm, values=careful)
        if isinstance(radius, Tensor):
            radius = per_sample_eps(radius, x)
        if start is not None and not self.takes_start:
            raise ValueError(f"{type(self).__name__} chooses its own start: leave start out, or take FGSM")
        if keep_graph:
            refuse_compiled(model)
        with prepared(model, self.bn_mode, frozen=not keep_graph):
            # Inference tensors cannot be saved for backward, and bf16 arithmetic steps out of the ball.
            wide = torch.promote_types(x.dtype, torch.float32)
            clean = x.detach().to(wide, copy=True)
            problem = Problem(
                model,
                clean,
                y.clone(),
                eps=radius,
                norm=self.norm,
                objective=Objective(losses.cross_entropy, (y,)),
                draws=self._draws(index, rank, x.device),
                dtype=x.dtype,
                careful=careful,
                targeted=self.targeted,
                progress=progress,
                asked=self.faster(model, fold=not keep_graph),
            )
            if start is not None:
                problem.given_start = start.detach().to(wide)
            problem.ledger.keep_graph = keep_graph
            self._verify("input", outside_box(clean), careful, clean)
            problem.objective = self._objective(problem, objective)
            x_adv = self.attempt(problem)
            if x_adv.shape != x.shape:
                raise ValueError(
                    f"{type(self).__name__} returned shape {tuple(x_adv.shape)} for images of shape {tuple(x.shape)}: "
                    "perturb() returns one image for each"
                )
            # Against the caller's x: what perturb() was given it may have changed in place.
            delta = x_adv - x.detach().to(wide)
            self._verify("gradient", problem.ledger.bad_gradient, careful)
            self._verify("result", outside_box(x_adv), careful, x_adv)
            norms = size(delta, self.norm)
            self._verify("ball", outside_ball(norms, radius * self.stays_within, self.norm), careful, norms)
        self.calls += 1
        self.samples += len(x)
        ledger = problem.ledger
        self.forwards += ledger.forwards.total
        self.backwards += ledger.backwards.total
        return Attacked(
            x_adv,
            ledger.forwards,
            ledger.backwards,
            ledger.start,
            ledger.first_logits,
            ledger.robust,
            norms,
            ledger.first_gradient,
        )

    def faster(self, model: nn.Module, fold: bool = True) -> Classifier:
        """The same network in less time; ``fold`` where no gradient reaches its weights."""
        fixed = fold and self.bn_mode == "eval"
        fold, replay = fixed and self.fold_batchnorm, fixed and self.cuda_graphs
        if not isinstance(model, nn.Module) or not (fold or replay or self.channels_last):
            return model
        folded = Folded(model, fold=fold, channels_last=self.channels_last)
        return Graphed(folded) if replay and not compiled_parts(model) else folded

    def attempt(self, problem: Problem) -> Tensor:
        """All tries: :meth:`perturb`, and again where it failed, as often as ``restarts`` says.

        What an attack made of other attacks calls on each, with a problem of its own.
        """
        x_adv = self.perturb(problem, problem.x, problem.y).detach()
        if self.restarts == 1 or x_adv.shape != problem.x.shape:
            return x_adv
        best = Best(problem)
        best.offer(x_adv, problem.logits(x_adv))
        for restart in range(1, self.restarts):
            rows = best.standing.nonzero().squeeze(1)
            if not len(rows):
                break
            part = problem.rows(rows, problem.draws.fork(restart).rows(rows))
            x_adv = self.perturb(part, part.x, part.y).detach()
            best.offer(x_adv, part.logits(x_adv), rows)
        return best.x_adv

    def raise_if_violated(self) -> None:
        """Report what calls with ``careful=False`` saw; makes the device wait once."""
        if self._violations is not None:
            seen = self._violations.tolist()
            self._violations = None
            for kind, bad in zip(COMPLAINTS, seen, strict=True):
                if bad:
                    raise ValueError(COMPLAINTS[kind].format(attack=type(self).__name__, found=""))

    def aim(self, y: Tensor, num_classes: int, index: Tensor) -> Tensor:
        """Labels that an evaluation passes to the attack: ``y``, or for a targeted attack a random other class, (B,)."""
        if self.stays_within > 1:
            raise ValueError(f"{type(self).__name__} leaves the ball and is for training alone: evaluate with PGD, say")
        if not self.targeted:
            return y
        draws = SampleDraws((self.seed, "target"), index)
        shift = draws.uniform(torch.empty(len(y), 1, device=y.device)).squeeze(1) * (num_classes - 1)
        return (y + 1 + shift.long()) % num_classes

    # Lightning's side ------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    def training_state(self) -> dict[str, int]:
        """Position of the random stream and the passes spent so far, which the method that trains with it saves."""
        return {key: getattr(self, key) for key in ("calls", "samples", "forwards", "backwards")}

    def load_training_state(self, state: dict[str, int]) -> None:
        """Go on where :meth:`training_state` was taken."""
        for key, value in state.items():
            setattr(self, key, value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that somebody evaluates the attacks, also where the module is not one of ours."""
        RobustEvaluation.ensure(trainer)

    # What happens around perturb -------------------------------------------------------------------------------------

    def _draws(self, index: Tensor | None, rank: int, device: torch.device) -> Draws:
        if index is not None:
            return SampleDraws((self.seed, self.name or type(self).__name__, 0), index)
        return StreamDraws(seed_from(self.seed, rank, self.calls, 0), device)

    def _objective(self, problem: Problem, callers: ObjectiveName | Objective | None) -> Objective:
        chosen = self.objective or callers or "ce"
        if chosen == "kl":
            check_kl(self.random_start, self.targeted)
        if isinstance(chosen, str):
            given = problem.logits(problem.x) if chosen == "kl" else problem.y
            chosen = Objective(OBJECTIVES[chosen], (given,))
        chosen = chosen.usable()
        if not self.targeted:
            return chosen
        return Objective(lambda logits, *given: -chosen.loss(logits, *given), chosen.given)

    def _verify(self, kind: str, bad: Tensor, careful: bool, found: Tensor | None = None) -> None:
        if careful:
            if bad:
                where = "" if found is None else f" (from {found.min().item():.4g} to {found.max().item():.4g})"
                raise ValueError(COMPLAINTS[kind].format(attack=type(self).__name__, found=where))
            return
        if self._violations is None:
            self._violations = torch.zeros(len(COMPLAINTS), dtype=torch.bool, device=bad.device)
        self._violations[list(COMPLAINTS).index(kind)] |= bad
