"""IAD-II."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.distillation import KLReduction, distillation, introspection, trust
from ...nets.teacher import as_teacher
from ..base import OptimizerFactory
from ..schedules import Schedule
from .arguments import check_introspection, check_share, check_temperature
from .base import Distillation, TaughtExample
from .igdm import IGDM


@dataclass
class IADIIExample(TaughtExample):
    """A batch with what the standard teacher says of its attacked pixels, too.

    Args:
        clean_teacher_logits_adv: of attacked pixels, (B, K), without gradient.
    """

    clean_teacher_logits_adv: Tensor | None = None


class IADII(Distillation):
    """IAD-II (Zhu et al. 2022, arXiv 2106.04928): a robust and a standard teacher, both asked about attacked pixels.

    The trust in the robust teacher T is a_i = softmax(T(x_adv))_y ** beta for each sample. At temperature t, but for the
    student's own prediction, which is at 1::

        L = (1 - robust_share - clean_share) * CE(S(x_adv), y)
            + robust_share * t^2 * [ a_i * KL(T(x_adv) || S(x_adv)) + (1 - a_i) * KL(S(x) || S(x_adv)) ]
            + clean_share * t^2 * KL(T_clean(x_adv) || S(x_adv))

    Until the epoch ``begin`` a_i is 1. The gradient flows through S(x) as well, as in the authors' code, unless
    ``detach_self``. The attack maximises the cross-entropy of the true label; the authors' runs in train mode, see
    :class:`ARD`. IAD-I, with one teacher, is :class:`IAD`.

    Cost: the attack's passes, one forward and one backward pass until ``begin`` and two each from then on, and one forward pass
    of each teacher: 12 + 12, 1 and 1 with PGD-10.

    Args:
        teacher: the robust one.
        clean_teacher: the standard one; the authors' method asks it about attacked pixels, where it is mostly wrong.
        robust_share: weight of the robust teacher and of the student's own prediction.
        clean_share: weight of the standard teacher.
        temperature: t.
        beta: how quickly trust falls, see :class:`IAD`.
        begin: first epoch, counted from 0, in which the student asks itself.
        detach_self: take S(x) as a constant target.
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if shares are negative or sum to more than 1, the temperature is not positive, or beta or begin negative.
    """

    asks_clean = False
    asks_adversarial = True

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        clean_teacher: nn.Module,
        attack: Attack | None = None,
        robust_share: float = 0.5,
        clean_share: float = 0.25,
        temperature: float = 1.0,
        beta: float = 0.1,
        begin: int = 40,
        detach_self: bool = False,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        check_share("robust_share", robust_share)
        check_share("clean_share", clean_share)
        check_share("robust_share + clean_share", robust_share + clean_share)
        check_temperature(temperature)
        check_introspection(beta, begin)
        self.clean_teacher = as_teacher(clean_teacher)
        self.robust_share, self.clean_share, self.temperature = robust_share, clean_share, temperature
        self.beta, self.begin, self.detach_self = beta, begin, detach_self

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def expectations(self) -> dict[str, str]:
        return {"teacher": "robustness", "clean_teacher": "accuracy"}

    @property
    def introspective(self) -> bool:
        """Whether the student asks itself yet."""
        return self.current_epoch >= self.begin

    @property
    def student_sees_clean(self) -> bool:  # type: ignore[override]
        """Whether anything is learned from clean pixels."""
        return self.introspective

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> IADIIExample:
        example = super().craft(batch, eps)
        return IADIIExample(**vars(example), clean_teacher_logits_adv=self.ask("clean_teacher", example.x_adv))

    def distil(self, example: IADIIExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        t = self.temperature
        robust = distillation(logits_adv, example.teacher_logits_adv, t)
        if self.introspective:
            trusted = trust(example.teacher_logits_adv, example.y, self.beta)
            own = logits.detach() if self.detach_self else logits
            robust = trusted * robust + t**2 * introspection(logits_adv, own, trusted)
        clean = distillation(logits_adv, example.clean_teacher_logits_adv, t)
        label = (1 - self.robust_share - self.clean_share) * F.cross_entropy(logits_adv, example.y)
        return label + self.reduce(self.robust_share * robust + self.clean_share * clean)
