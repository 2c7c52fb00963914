"""IAD-I."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction, distillation, introspection, trust
from ..base import OptimizerFactory
from ..schedules import Schedule
from .arguments import check_introspection, check_share, check_temperature
from .base import Distillation, TaughtExample
from .igdm import IGDM


class IAD(Distillation):
    """IAD-I (Zhu et al. 2022, arXiv 2106.04928): ARD by a student that trusts its teacher only as far as that is right.

    The trust in the teacher, for each sample, is a_i = softmax(T(x_adv))_y ** beta. Until the epoch ``begin`` the loss is that
    of :class:`ARD`; from then on, with both softmaxes of the first divergence at temperature t::

        L = alpha * [ w_i * t^2 * KL(T(x) || S(x_adv)) + (1 - a_i) * KL(S(x) || S(x_adv)) ] + (1 - alpha) * CE(S(x), y)

    where w_i is 1, as in the code that the authors released, or a_i with ``weight_teacher``, as in the paper's equation. That
    the equation says so is from memory. The gradient flows through S(x) as well, as in their code, unless ``detach_self``.
    The attack maximises the cross-entropy of the true label; the authors' runs in train mode, see :class:`ARD`.

    Cost: the attack's passes, one forward and one backward pass and one forward pass of the teacher until ``begin``, and two
    each from then on: 12 + 12 and 2 with PGD-10.

    Args:
        alpha: share of the divergences.
        temperature: t.
        beta: how quickly trust falls; 0.1 keeps it high: 0.93 where the teacher gives the label 0.5, and 0.63 at 0.01.
        begin: first epoch, counted from 0, in which the student asks itself.
        weight_teacher: weigh the teacher's divergence by the trust.
        detach_self: take S(x) as a constant target.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if alpha is outside of [0, 1], the temperature not positive, or beta or begin negative.
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 1.0,
        temperature: float = 1.0,
        beta: float = 0.1,
        begin: int = 60,
        weight_teacher: bool = False,
        detach_self: bool = False,
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
        check_introspection(beta, begin)
        self.alpha, self.temperature, self.beta, self.begin = alpha, temperature, beta, begin
        self.weight_teacher, self.detach_self = weight_teacher, detach_self

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    @property
    def introspective(self) -> bool:
        """Whether the student asks itself yet."""
        return self.current_epoch >= self.begin

    @property
    def asks_adversarial(self) -> bool:  # type: ignore[override]
        """Trust is a matter of what the teacher says of attacked pixels."""
        return self.introspective

    @property
    def student_sees_clean(self) -> bool:  # type: ignore[override]
        """Whether anything is learned from clean pixels."""
        return self.introspective or self.alpha < 1

    def target(self, example: TaughtExample) -> Tensor:
        """The teacher's logits (B, K) that the student learns."""
        return example.teacher_logits

    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        each = distillation(logits_adv, self.target(example), self.temperature)
        if self.introspective:
            trusted = trust(example.teacher_logits_adv, example.y, self.beta)
            own = logits.detach() if self.detach_self else logits
            each = (trusted * each if self.weight_teacher else each) + introspection(logits_adv, own, trusted)
        loss = self.alpha * self.reduce(each)
        return loss if self.alpha == 1 else loss + (1 - self.alpha) * F.cross_entropy(logits, example.y)
