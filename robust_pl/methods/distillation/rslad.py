"""RSLAD."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.problem import Objective
from ...functional.distillation import KLReduction
from ...functional.losses import kl_divergence
from ..base import OptimizerFactory
from ..schedules import Schedule
from .base import Distillation, TaughtExample
from .igdm import IGDM


class RSLAD(Distillation):
    """RSLAD (Zi et al. 2021, arXiv 2108.07969): the robust teacher's soft labels wherever there were hard ones.

    With p = softmax(T(x)), the teacher asked on clean pixels alone: L = alpha KL(p || S(x_adv)) + (1 - alpha) KL(p || S(x)).
    The attack maximises KL(p || S(x_adv)), from x + 0.001 * N(0, 1) without an attack of your own. No true label is used.
    The authors' code takes ``kl_reduction: mean``, and on CIFAR-100 ten times that.

    Cost: the attack's passes, two forward and two backward passes, and one forward pass of the teacher: 12 + 12 and 1 with
    PGD-10.

    Args:
        alpha: weight of the attacked pixels; 5/6 is the authors'.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if alpha is outside of [0, 1].
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 5 / 6,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is a share: choose from [0, 1]")
        self.alpha = alpha
        self.student_sees_clean = alpha < 1

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    def attack_objective(self, example: TaughtExample) -> Objective:
        return Objective(kl_divergence, (example.teacher_logits,))

    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        loss = self.alpha * self.reduce(kl_divergence(logits_adv, example.teacher_logits))
        if logits is None:
            return loss
        return loss + (1 - self.alpha) * self.reduce(kl_divergence(logits, example.teacher_logits))
