"""AdaIAD."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.ledger import Attacked
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction, distillation, introspection, trust
from ..base import OptimizerFactory
from ..schedules import Schedule
from .arguments import check_introspection, check_share, check_temperature
from .base import Distillation, TaughtExample
from .igdm import IGDM
from .joint_attack import attack_jointly, check_precision


class AdaIAD(Distillation):
    """AdaIAD (Huang, Chen, Wang, Lu, Cheng, Wang 2023, CVPR): the attack of :class:`AdaAD` and the introspection of IAD.

    With the trust a_i = softmax(T(x_adv))_y ** beta and both softmaxes of the first divergence at temperature t::

        L = alpha * [ t^2 * KL(T(x_adv) || S(x_adv)) + (1 - a_i) * KL(S(x) || S(x_adv)) ] + (1 - alpha) * CE(S(x), y)

    Until the epoch ``begin`` a_i is 1. The teacher's target is that of attacked pixels, where :class:`IAD` has that of clean
    ones. The gradient flows through S(x) as well, as in the authors' code, unless ``detach_self``. That they wait for ``begin``
    with the whole introspection, as IAD does, is our reading.

    Cost: the attack's passes, each through both networks, one forward and one backward pass until ``begin`` and two each from
    then on, and one forward pass of the teacher: 12 + 12 of the student and 11 + 10 of the teacher with PGD-10.

    Args:
        alpha: share of the divergences.
        temperature: t.
        beta: how quickly trust falls, see :class:`IAD`.
        begin: first epoch, counted from 0, in which the student asks itself.
        weight_teacher: weigh the teacher's divergence by the trust, too, which the authors' code does not.
        detach_self: take S(x) as a constant target.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if alpha is outside of [0, 1], the temperature not positive, or beta or begin negative.
    """

    asks_clean = False
    asks_adversarial = True

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 1.0,
        temperature: float = 30.0,
        beta: float = 0.1,
        begin: int = 60,
        weight_teacher: bool = False,
        detach_self: bool = False,
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
        check_temperature(temperature)
        check_introspection(beta, begin)
        self.alpha, self.temperature, self.beta, self.begin = alpha, temperature, beta, begin
        self.weight_teacher, self.detach_self = weight_teacher, detach_self

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    @property
    def introspective(self) -> bool:
        """Whether the student asks itself yet."""
        return self.current_epoch >= self.begin

    @property
    def student_sees_clean(self) -> bool:  # type: ignore[override]
        """Whether anything is learned from clean pixels."""
        return self.introspective or self.alpha < 1

    def run_attack(self, example: TaughtExample, eps: Tensor | None = None) -> Attacked:
        if self.attack is None or self.attack.objective is not None:
            return super().run_attack(example, eps)
        return attack_jointly(self.attack, self.net, self.teacher, example, eps, self.global_rank)

    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        each = distillation(logits_adv, example.teacher_logits_adv, self.temperature)
        if self.introspective:
            trusted = trust(example.teacher_logits_adv, example.y, self.beta)
            own = logits.detach() if self.detach_self else logits
            each = (trusted * each if self.weight_teacher else each) + introspection(logits_adv, own, trusted)
        loss = self.alpha * self.reduce(each)
        return loss if self.alpha == 1 else loss + (1 - self.alpha) * F.cross_entropy(logits, example.y)
