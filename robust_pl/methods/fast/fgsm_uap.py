"""FGSM-UAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import Number
from ...callbacks.attacks.draws import StreamDraws, seed_from
from ...callbacks.attacks.fgsm import FGSM
from ...functional.fairness import class_sums
from ...functional.geometry import project
from ...functional.losses import wide
from ..base import Method, OptimizerFactory
from ..example import Example
from ..late_buffers import LateBuffers
from ..ranks import sum_over_ranks
from ..schedules import Schedule
from .crafting import radius_of
from .started import StartedExample, check_given_start, logits_at_start, run_from


@dataclass
class GroupedExample(StartedExample):
    """A batch whose attack began at perturbations that samples share.

    Args:
        group: which perturbation each sample began with, int64 (B,).
    """

    group: Tensor | None = None


class FGSMUAP(Method):
    """FGSM-UAP (Pan, Li and Yao, AAAI 2024): FGSM adversarial training from one perturbation that all samples share.

    With u the universal perturbation and both points cut to the ball and the box,

        x0 = x + u,  g = grad CE(f(x0), y),  x_adv = x0 + eps * sign(g)
        L = CE(f(x_adv), y) + lmbda * MSE(f(x_adv), f(x0))

    where the gradient flows through both logits. After the optimizer's step the perturbation follows the gradients, with
    g' = g / ||g||_1, whose norm is that of the whole batch of all processes:

        mu <- mean g' + decay * mu,  u <- clip(u + uap_eps * sign(mu), -uap_eps, uap_eps)

    so that each entry of u is -uap_eps, 0 or uap_eps; it begins at random signs, drawn by the attack's seed, and mu at zero.
    :class:`FGSMCUAP` has one perturbation a class and :class:`FGSMFUAP` one a cluster of features; those that no sample of a
    step began with stay. They are equal on all processes and part of the checkpoint: 2 * M * C * H * W numbers for M of
    them, 25 kB for one of CIFAR's size. The authors train with labels smoothed by 0.4, in the attack, too.

    Without an attack it takes FGSM at 8/255 in train mode, as the authors do, and cost then is two forward and three backward
    passes a step, since the loss uses the attack's pass again; with ``bn_mode`` ``eval`` or ``train_no_track`` it takes one
    more forward pass. A compiled network is refused where the pass is used twice.

    Args:
        attack: FGSM of norm linf, without a start of its own.
        uap_eps: size of the perturbation, in units of pixels; the authors take 10/255 for eps 8/255. A larger one than eps
            means that the start is a corner of the ball, or x.
        lmbda: weight of the change of logits.
        decay: of mu; the authors' code has 0.3, whatever its settings say.
        net: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the attack is no FGSM.
        ValueError: if an argument is out of its range, the attack has a start of its own, or a checkpoint holds another number
            of perturbations or perturbations of another size.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        uap_eps: Number = 10 / 255,
        lmbda: float = 10.0,
        decay: float = 0.3,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_given_start(self.attack, type(self).__name__, "a perturbation that samples share")
        if not 0 < uap_eps <= 1:
            raise ValueError(f"uap_eps={uap_eps} must be above 0, and at most 1 as pixels are: write 10/255")
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.uap_eps, self.lmbda, self.decay = float(uap_eps), lmbda, decay
        self.universal = LateBuffers("u", "mu")

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")

    def perturbations(self) -> int:
        """How many there are, M."""
        return 1

    def group(self, example: Example) -> Tensor:
        """Which of them each sample begins with, int64 (B,)."""
        return torch.zeros(len(example.x), dtype=torch.int64, device=example.x.device)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> GroupedExample:
        example = self.clean(batch)
        return self.attacked(example, radius_of(self, example.x, eps), wide(example.x), self.group(example))

    def attacked(self, example: Example, radius: float | Tensor, at: Tensor, group: Tensor) -> GroupedExample:
        """Attack from ``at``, pixels (B, C, H, W), with the perturbation of each sample's group added."""
        x = wide(example.x)
        start = project(at + self._shared(x)[group], x, radius, "linf")
        eps = radius if isinstance(radius, Tensor) else None
        return GroupedExample(**vars(run_from(self, example, eps, start)), group=group)

    def loss(self, example: GroupedExample) -> Tensor:
        start, logits = wide(logits_at_start(self, example)), wide(self(example.x_adv))
        return F.cross_entropy(logits, example.y) + self.lmbda * F.mse_loss(logits, start)

    @torch.no_grad()
    def after_step(self, example: GroupedExample) -> None:
        u, mu = self.universal.u, self.universal.mu
        sums, counts = class_sums(example.gradient.flatten(1), example.group, len(u))
        summed = sum_over_ranks(torch.cat([sums.flatten(), counts, example.gradient.abs().sum().view(1)]))
        sums, counts, norm = summed.split([sums.numel(), len(counts), 1])
        counts = counts.view(-1, 1, 1, 1)
        mean = sums.view_as(mu) / counts.clamp_min(1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        seen = counts > 0
        mu.copy_(torch.where(seen, mean + self.decay * mu, mu))
        moved = (u + self.uap_eps * mu.sign()).clamp(-self.uap_eps, self.uap_eps)
        u.copy_(torch.where(seen, moved, u))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, module in self.named_modules():
            if isinstance(module, LateBuffers):
                module.make_room(checkpoint["state_dict"], name)
        count = self.perturbations()
        if len(self.universal.u) not in (0, count):
            raise ValueError(
                f"the checkpoint holds {len(self.universal.u)} universal perturbations and {type(self).__name__} has {count} "
                "here: go on with the classes or clusters of the run, or start a new one from its weights with "
                "--model.init_args.weights"
            )
        super().on_load_checkpoint(checkpoint)

    def _shared(self, x: Tensor) -> Tensor:
        """The perturbations, (M, C, H, W)."""
        if self.universal.empty:
            like = x.new_empty(self.perturbations(), *x.shape[1:])
            # Without the rank in it: all processes draw the same.
            draws = StreamDraws(seed_from(self.attack.seed, "universal"), x.device)
            u = self.uap_eps * (draws.uniform(like) - 0.5).sign()
            self.universal.begin(u=u, mu=torch.zeros_like(u))
        u = self.universal.u
        if u.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"the universal perturbations are of images {tuple(u.shape[1:])} and these are {tuple(x.shape[1:])}: give all "
                "images of a run, and of the run that it goes on from, one size"
            )
        return u
