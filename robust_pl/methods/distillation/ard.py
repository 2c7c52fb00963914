"""ARD."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction, distillation
from ..base import OptimizerFactory
from ..schedules import Schedule
from .arguments import check_share, check_temperature
from .base import Distillation, TaughtExample
from .igdm import IGDM


class ARD(Distillation):
    """ARD (Goldblum, Fowl, Feizi, Goldstein 2020, arXiv 1905.09747): on attacked pixels, what the teacher says of clean ones.

    L = alpha * t^2 * KL(T(x) || S(x_adv)) + (1 - alpha) * CE(S(x), y), both softmaxes of the divergence at temperature t. The
    attack maximises the cross-entropy of the true label.

    The authors attack in train mode, where each step moves BatchNorm's statistics (``bn_mode: train``), begin outside of
    [0, 1] where the random start leads there, and forward the clean images also where alpha = 1 and nothing is learned from
    them; here that pass is spared. Their code takes ``kl_reduction: mean``.

    Cost: the attack's passes, one forward and one backward pass (two each where alpha < 1), and one forward pass of the
    teacher: 11 + 11 and 1 with PGD-10.

    Args:
        alpha: share of the teacher; 1, the authors' default, leaves the labels to the attack alone.
        temperature: t; 30 on CIFAR-10. That of CIFAR-100 is 5, from memory.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if alpha is outside of [0, 1], or the temperature not positive.
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 1.0,
        temperature: float = 30.0,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        check_share("alpha", alpha)
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature
        self.student_sees_clean = alpha < 1

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        loss = self.alpha * self.reduce(distillation(logits_adv, example.teacher_logits, self.temperature))
        if logits is None:
            return loss
        return loss + (1 - self.alpha) * F.cross_entropy(logits, example.y)
