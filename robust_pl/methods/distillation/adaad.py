"""AdaAD."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.ledger import Attacked
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction
from ...functional.losses import kl_divergence
from ..base import OptimizerFactory
from ..schedules import Schedule
from .arguments import check_share
from .base import Distillation, TaughtExample
from .igdm import IGDM
from .joint_attack import StudentAndTeacher, attack_jointly, check_precision


class AdaAD(Distillation):
    """AdaAD (Huang, Chen, Wang, Lu, Cheng, Wang 2023, CVPR): the attack asks the teacher, too, and so does the loss there.

    The attack maximises KL(T(x_adv) || S(x_adv)), with the gradient through student *and* teacher, from x + 0.001 * N(0, 1)
    without an attack of your own: it looks for where they disagree most. Then
    L = alpha * KL(T(x_adv) || S(x_adv)) + (1 - alpha) * KL(T(x) || S(x)). No true label is used. An attack that names an
    objective of its own keeps it, and goes through the student alone.

    The authors' recipe trains at 8/255 with steps of 2/255; the defaults of their code are 16/255 and 4/255. It takes
    ``kl_reduction: mean`` on CIFAR-10 and ``batchmean`` on CIFAR-100.

    Cost: the attack's passes, each through both networks, one forward and one backward pass and one forward pass of the teacher
    (two each where alpha < 1): 11 + 11 of the student and 11 + 10 of the teacher with PGD-10.

    Args:
        alpha: share of the attacked pixels; with 1, the authors' default, clean ones are not seen.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if alpha is outside of [0, 1].
    """

    asks_adversarial = True

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 1.0,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        check_precision(self.teacher)
        check_share("alpha", alpha)
        self.alpha = alpha
        self.asks_clean = self.student_sees_clean = alpha < 1

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    @cached_property
    def both(self) -> StudentAndTeacher:
        """What is attacked; no module of its own, since its networks are this one's."""
        return StudentAndTeacher(self.net, self.teacher)

    def run_attack(self, example: TaughtExample, eps: Tensor | None = None) -> Attacked:
        if self.attack is None or self.attack.objective is not None:
            return super().run_attack(example, eps)
        return attack_jointly(self.attack, self.both, example, eps, self.global_rank)

    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        loss = self.alpha * self.reduce(kl_divergence(logits_adv, example.teacher_logits_adv))
        if logits is None:
            return loss
        return loss + (1 - self.alpha) * self.reduce(kl_divergence(logits, example.teacher_logits))
