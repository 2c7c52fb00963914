"""AAER."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.noisy_fgsm import NoisyFGSM
from ...functional.losses import hard_cross_entropy, wide
from ...functional.regularizers import abnormality
from ..base import Method, OptimizerFactory
from ..example import Example
from ..ranks import mean_over_ranks
from ..schedules import Schedule


@dataclass
class ComparedExample(Example):
    """A batch with what the network said before the attack's step.

    Args:
        start_logits: where the attack began, (B, K), without a graph.
        abnormal: whether the attack's step lowered the loss, bool (B,); written where the loss is first asked, at the weights
            of the step.
    """

    start_logits: Tensor | None = None
    abnormal: Tensor | None = None


class AAER(Method):
    """AAER (Lin et al. 2023, arXiv 2404.08154): few training samples whose loss the attack lowers, and little change of those.

    Such abnormal samples appear when single-step training is about to overfit to its own attack. With losses l0 and outputs z0
    at the attack's start and l and z at its end, both of hard labels, A the samples with l0 > l and N all others,

        L = mean CE(z, y) + lambda_1 * |A| / B * [lambda_2 * mean_A (l0 - l) + lambda_3 * max(V_A - V_N, 0)]

    where V is the mean of ||z0 - z||^2 over A or N; with either set empty, L is CE alone. z0 and V_N are held fixed, and sizes
    and means are those of all processes together. The authors' code also holds l fixed, so that lambda_2 changes the value of
    the loss and none of its gradients: what works is lambda_1 lambda_3 |A| / B * V_A. The public benchmark (arXiv 2604.22853)
    cuts V_A - V_N at 100, above which it has no gradient; here it is not bounded. CE sees the labels as they are given; authors
    and benchmark give hard ones.

    The attack decides between the paper's two variants. N-AAER: :class:`robust_pl.callbacks.NoisyFGSM`, the default at 8/255,
    since it is the stronger one in the paper and the one with published benchmark results. RS-AAER: ``FGSM(8/255, 10/255,
    random_start=True, bn_mode="train")`` with ``loss_weight=2.5`` and ``output_weight=1.5`` (3.5 and 1.5 on CIFAR-100). z0 is
    the attack's own pass: leave its ``bn_mode`` at ``train``, as it is in the loss, or else the shift also measures the
    difference of modes. Cost: two forward and two backward passes a step.

    Args:
        count_weight: lambda_1, of the share of abnormal samples.
        loss_weight: lambda_2; 1.5 is the authors' at 8/255 for N-AAER.
        output_weight: lambda_3; 0.15 likewise.
        attached: let the gradient flow through l in lambda_2's term, which then raises the loss of abnormal samples.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if a weight is negative or, at the first batch, the attack takes no gradient at one start.
    """

    inner_objective = "ce_hard"

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        count_weight: float = 1.0,
        loss_weight: float = 1.5,
        output_weight: float = 0.15,
        attached: bool = False,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        for field, value in (("count_weight", count_weight), ("loss_weight", loss_weight), ("output_weight", output_weight)):
            if value < 0:
                raise ValueError(f"{field}={value} must be at least 0")
        self.count_weight, self.attached = count_weight, attached
        self.loss_weight, self.output_weight = loss_weight, output_weight

    @staticmethod
    def default_attack() -> NoisyFGSM:
        return NoisyFGSM()

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> ComparedExample:
        example = self.clean(batch)
        attacked = self.run_attack(example, eps)
        if attacked.first_logits is None:
            raise ValueError(
                f"AAER compares with the attack's own pass at its start, and {type(self.attack).__name__} takes none: choose "
                "FGSM or NoisyFGSM"
            )
        x = example.x
        return ComparedExample(x, example.y, example.index, attacked.x_adv.to(x.dtype), attacked.first_logits)

    def loss(self, example: ComparedExample) -> Tensor:
        logits, before = self(example.x_adv), example.start_logits
        losses = hard_cross_entropy(wide(logits), example.y)
        drop = hard_cross_entropy(before, example.y) - (losses if self.attached else losses.detach())
        if example.abnormal is None:
            example.abnormal = drop.detach() > 0
        shift = (before - wide(logits)).square().sum(1)
        penalty = abnormality(drop, shift, example.abnormal, self.loss_weight, self.output_weight, mean_over_ranks)
        return F.cross_entropy(logits, example.y) + self.count_weight * penalty
