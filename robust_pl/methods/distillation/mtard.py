"""MTARD."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction, balance_losses
from ...functional.losses import kl_divergence
from ...nets.teacher import as_teacher
from ..base import OptimizerFactory
from ..ranks import mean_over_ranks
from ..schedules import Schedule
from .base import Distillation, TaughtExample
from .igdm import IGDM


@dataclass
class TwiceTaughtExample(TaughtExample):
    """A batch with what both teachers say of it.

    Args:
        clean_teacher_logits: of the clean teacher, on clean pixels, (B, K).
        losses: divergence from the robust teacher and from the clean one, (B, 2); written where the loss is first asked, at the
            weights of the step.
    """

    clean_teacher_logits: Tensor | None = None
    losses: Tensor | None = None


class MTARD(Distillation):
    """MTARD (Zhao et al. 2022; arXiv 2306.16170 extends it): a robust teacher on attacked, a clean one on clean pixels.

    L = w * KL(T_robust(x_adv) || S(x_adv)) + (1 - w) * KL(T_clean(x) || S(x)), with weights that follow the losses once a step:
    what was learned more slowly than the other, in units of its loss at the first step, gets more weight, see
    :func:`robust_pl.functional.distillation.balance_losses`. The attack maximises cross-entropy with the true labels, from
    x + 0.001 * N(0, 1) without an attack of your own.

    Weights and first losses are means over all processes, part of the checkpoint, and computed before the gradient, so that a
    step sees its own; with accumulated gradients each micro-batch does, and what is kept is of the whole step. The authors add
    1e-5 inside the teacher's logarithm, which has no gradient and shifts the losses a little; it is left out here. They take
    ``kl_reduction: mean``, on which the weights do not depend.

    Cost: the attack's passes, two forward and two backward passes, and one forward pass of each teacher: 12 + 12 and 2 with
    PGD-10.

    Args:
        teacher: the robust one.
        clean_teacher: the accurate one, given as ``teacher`` is.
        balance_rate: how far the weights go in one step, in [0, 1]; it falls with the learning rate, as in the authors' code.
        beta: how strongly the weights follow the losses.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if ``balance_rate`` is outside of [0, 1] or ``beta`` negative.
    """

    asks_clean = False
    asks_adversarial = True

    balance: Tensor
    first_losses: Tensor
    begun: Tensor

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        clean_teacher: nn.Module,
        attack: Attack | None = None,
        balance_rate: float = 0.025,
        beta: float = 1.0,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        if not 0 <= balance_rate <= 1:
            raise ValueError(f"balance_rate={balance_rate} is how far weights go in a step: choose from [0, 1]")
        if beta < 0:
            raise ValueError(f"beta={beta} must be at least 0")
        self.clean_teacher = as_teacher(clean_teacher)
        self.balance_rate, self.beta = balance_rate, beta
        self.register_buffer("balance", torch.tensor([0.5, 0.5]))
        self.register_buffer("first_losses", torch.zeros(2))
        self.register_buffer("begun", torch.tensor(False))

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    def expectations(self) -> dict[str, str]:
        return {"teacher": "robustness", "clean_teacher": "accuracy"}

    def clean(self, batch: tuple[Tensor, ...]) -> TwiceTaughtExample:
        example = TwiceTaughtExample(**vars(super().clean(batch)))
        return replace(example, clean_teacher_logits=self.ask("clean_teacher", example.x, example.index))

    def targets(self, example: TwiceTaughtExample) -> tuple[Tensor, Tensor]:
        """Logits (B, K) that the student learns on attacked and on clean pixels."""
        return example.teacher_logits_adv, example.clean_teacher_logits

    def distil(self, example: TwiceTaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        robust, clean = self.targets(example)
        each = torch.stack([kl_divergence(logits_adv, robust), kl_divergence(logits, clean)], 1)
        if example.losses is None:
            example.losses = each.detach()
        balance, _ = self._balanced(example)
        return (balance * self.reduce(each)).sum()

    def after_step(self, example: TwiceTaughtExample) -> None:
        balance, first = self._balanced(example)
        self.balance.copy_(balance)
        self.first_losses.copy_(first)
        self.begun.fill_(True)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("train/weight_robust", self.balance[0])

    def _balanced(self, example: TwiceTaughtExample) -> tuple[Tensor, Tensor]:
        """Weights of this step, and losses of the first one, (2,) each."""
        losses = mean_over_ranks(example.losses.mean(0))
        first = torch.where(self.begun, self.first_losses, losses)
        return balance_losses(self.balance, losses, first, self.balance_rate * self.lr_factor(), self.beta), first
