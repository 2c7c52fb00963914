"""AdaIAD."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.ledger import Attacked
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction
from ..base import OptimizerFactory
from ..schedules import Schedule
from .base import TaughtExample
from .iad import IAD
from .igdm import IGDM
from .joint_attack import StudentAndTeacher, attack_jointly, check_precision


class AdaIAD(IAD):
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
    asks_adversarial = True  # type: ignore[assignment]

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
        super().__init__(
            net,
            teacher,
            attack,
            alpha,
            temperature,
            beta,
            begin,
            weight_teacher,
            detach_self,
            igdm,
            kl_reduction,
            optimizer,
            schedule,
            weights,
            num_classes,
        )
        check_precision(self.teacher)

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

    def target(self, example: TaughtExample) -> Tensor:
        return example.teacher_logits_adv
