"""LIET."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import check_count
from ...callbacks.attacks.draws import Draws, StreamDraws, seed_from
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.noisy_fgsm import NoisyFGSM
from ...callbacks.attacks.prepare import prepared
from ...callbacks.attacks.problem import Objective
from ...functional.gradients import input_gradient
from ...functional.losses import cross_entropy, hard, wide
from ...functional.output_distances import jensen_shannon
from ...functional.smoothing import randomly_smoothed
from ..base import Method, OptimizerFactory
from ..late_buffers import LateBuffers
from ..ranks import sum_over_ranks
from ..schedules import Schedule
from .crafting import draws_of, radius_of
from .started import StartedExample, check_given_start, logits_at_start, run_from

_GREY = 0.5


@dataclass
class SmoothedExample(StartedExample):
    """A batch with the labels that its loss takes.

    Args:
        soft: smoothed at random, (B, K).
    """

    soft: Tensor | None = None


class LIET(Method):
    """Label information elimination training (Pan et al., ICCV 2025): FGSM adversarial training from patterns that tell the
    class, with a random sign and random holes, so that the network does not learn to read the class from its attack.

    The pattern P_k of class k is the sign of the input gradient of a grey image (0.5) with label k, in eval mode; it is found
    anew in the first of every ``update_every`` batches of an epoch. In a batch, a share r ~ U(mask_min, mask_max) of all
    entries of d = eps * P_y is replaced by U(-eps, eps), and with one sign +-1 for the whole batch

        x0 = x +- d,  g = grad CE(f(x0), soft),  x_adv = x0 + eps * sign(g)
        L = CE(f(x_adv), soft') + lmbda * (e + 1) / E * JS(softmax f(x0), softmax f(x_adv))

    in epoch e of E, where the gradient flows through both sides of the divergence. Labels are smoothed at random, see
    :func:`robust_pl.functional.smoothing.randomly_smoothed`, anew for each of the three gradients; mixed labels count as their
    largest entry, so leave other smoothing out. As in the authors' code, x0 is cut to the box.

    The attack says which of the authors' two forms is trained. FGSM, the default at 8/255, is cut to the ball and the box:
    theirs up to 8/255. ``NoisyFGSM(16/255, k=2)`` is cut to the box alone, and U(-k eps, k eps) fills the holes: theirs above
    8/255. Patterns are equal on all processes and part of the checkpoint, K * C * H * W numbers.

    Cost, with BatchNorm in train mode: two forward and three backward passes a step, since the loss uses the attack's pass
    again, and one of each of K grey images every ``update_every`` batches. A compiled network is refused.

    Args:
        attack: FGSM without a start of its own, or NoisyFGSM; both of norm linf.
        lmbda: weight of the divergence in the last epoch; the authors take 100 for CIFAR-10 and Tiny-ImageNet and 200 for
            CIFAR-100, and 20 for larger eps.
        smoothing: what is taken from the right class; 0.6, for CIFAR-100 0.8, and 0.4 for larger eps.
        mask_min: smallest share of noise; 0.1, and 0 for larger eps.
        mask_max: largest; 0.5, and 1 for larger eps.
        update_every: batches from one set of patterns to the next.
        net: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the attack is neither FGSM nor NoisyFGSM.
        ValueError: if an argument is out of its range, the attack has a start or an objective of its own, the number of epochs
            is not known, or a checkpoint holds patterns of other classes or images.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 100.0,
        smoothing: float = 0.6,
        mask_min: float = 0.1,
        mask_max: float = 0.5,
        update_every: int = 20,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        _check(self.attack)
        check_count("update_every", update_every)
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} is taken from the right class: choose from [0, 1)")
        if not 0 <= mask_min <= mask_max <= 1:
            raise ValueError(f"mask_min={mask_min} and mask_max={mask_max} are shares that must rise from 0 to 1")
        self.lmbda, self.smoothing, self.update_every = lmbda, smoothing, update_every
        self.mask_min, self.mask_max = mask_min, mask_max
        self.patterns = LateBuffers("signs")
        self._due = True

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.max_epochs in (None, -1):
            raise ValueError("LIET's lmbda rises from epoch to epoch until the last: set trainer.max_epochs")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._due = batch_idx % self.update_every == 0

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> SmoothedExample:
        example = self.clean(batch)
        x, seed = wide(example.x), self.attack.seed
        if self._due or self.patterns.empty:
            # Without the rank in it: all processes draw the same.
            self._find_patterns(x, StreamDraws(seed_from(seed, self.attack.calls, "patterns"), x.device))
            self._due = False
        radius, draws = radius_of(self, x, eps), draws_of(self, "liet", x.device)
        start = (x + self._initial(x, hard(example.y), radius, draws)).clamp(0.0, 1.0)
        # The attack maximises cross-entropy of the labels that it is given.
        started = run_from(self, replace(example, y=self._soft(example.y, x, draws)), eps, start)
        return SmoothedExample(**{**vars(started), "y": example.y}, soft=self._soft(example.y, x, draws))

    def loss(self, example: SmoothedExample) -> Tensor:
        start, logits = logits_at_start(self, example), self(example.x_adv)
        loss = F.cross_entropy(wide(logits), example.soft)
        return loss + self.weight() * jensen_shannon(start, logits)

    def weight(self) -> float:
        """Of the divergence in the running epoch."""
        return self.lmbda * (self.current_epoch + 1) / self.trainer.max_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.patterns.make_room(checkpoint["state_dict"], "patterns")
        if len(self.patterns.signs) not in (0, self.num_classes):
            raise ValueError(
                f"the checkpoint holds patterns of {len(self.patterns.signs)} classes and num_classes is {self.num_classes}: "
                "go on with the classes of the run, or start a new one from its weights with --model.init_args.weights"
            )
        super().on_load_checkpoint(checkpoint)

    def _soft(self, y: Tensor, x: Tensor, draws: Draws) -> Tensor:
        return randomly_smoothed(y, draws.uniform(x.new_empty(len(y), self.num_classes)), self.smoothing)

    def _initial(self, x: Tensor, y: Tensor, radius: float | Tensor, draws: Draws) -> Tensor:
        """Patterns with holes and a sign, (B, C, H, W)."""
        signs = self.patterns.signs
        if signs.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"the patterns are of images {tuple(signs.shape[1:])} and these are {tuple(x.shape[1:])}: give all images of a "
                "run, and of the run that it goes on from, one size"
            )
        share, side = draws.uniform(x.new_empty(2)).unbind()
        share = self.mask_min + (self.mask_max - self.mask_min) * share
        width = self.attack.k if isinstance(self.attack, NoisyFGSM) else 1.0
        noise = width * (2 * draws.uniform(x) - 1)
        filled = torch.where(draws.uniform(x) < share, noise, signs[y])
        return radius * torch.where(side < 0.5, -filled, filled)

    def _find_patterns(self, x: Tensor, draws: Draws) -> None:
        classes = torch.arange(self.num_classes, device=x.device)
        grey = torch.full((len(classes), *x.shape[1:]), _GREY, dtype=x.dtype, device=x.device)
        objective = Objective(cross_entropy, (self._soft(classes, x, draws),))
        with prepared(self, "eval"):
            gradient, _ = input_gradient(lambda images: wide(self(images)), grey, objective)
        self.attack.forwards += len(classes)
        self.attack.backwards += len(classes)
        # Summed, since a GPU may round otherwise than another does.
        signs = sum_over_ranks(gradient).sign()
        if self.patterns.signs.shape == signs.shape:
            self.patterns.signs.copy_(signs)
        else:
            self.patterns.begin(signs=signs)


def _check(attack: Attack) -> None:
    if isinstance(attack, NoisyFGSM):
        if attack.k < 1:
            raise ValueError(f"attack.k={attack.k}: LIET begins at patterns of eps, so it must be at least 1")
    else:
        check_given_start(attack, "LIET", "patterns of the classes")
    if attack.objective not in (None, "ce"):
        raise ValueError(f"attack.objective={attack.objective!r}: LIET's attack maximises cross-entropy of smoothed labels")
