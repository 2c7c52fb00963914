"""FGSM-RS-CS."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.noisy_fgsm import NoisyFGSM
from ...functional.regularizers import relaxed_labels
from ..base import Method, OptimizerFactory
from ..schedules import Schedule
from .arguments import check_label_factor
from .converge_smooth import ConvergeSmooth, Judged
from .started import StartedExample, logits_at_start, run_from


@dataclass
class JudgedExample(Judged, StartedExample):
    """A batch with its start, and the weight of its benign loss."""


class FGSMRSCS(Method):
    """FGSM-RS-CS (Zhao et al. 2023, ICCV): one step from noise, with a loss that is kept smooth over epochs.

    L = CE(f(x_adv), y) + w * CE(f(x + noise), y), where w is 1, 0 or -1, see :class:`ConvergeSmooth`. The noisy image takes the
    place of the clean one: the step begins there and is not brought back into the ball, and its loss is the benign one. The
    attack is :class:`robust_pl.callbacks.NoisyFGSM` with noise of eps. Its own pass is used again for the benign loss, where
    the authors take another one; their regularisers of outputs, switched off by default, are left out. A compiled network is
    refused.

    Cost: two forward and three backward passes a step, and two of the latter where the smoothing is off; where
    ``attack.bn_mode`` is not ``train``, one forward pass more.

    Args:
        smoothing: by default as the authors have it for their schedule of 110 epochs.
        label_factor: relax the labels of the loss once more, see
            :func:`robust_pl.functional.regularizers.relaxed_labels`; None takes them as they are. The authors take 0.6 on hard
            labels, a public benchmark (Pan and Yao 2026, arXiv 2604.22853) 0.6 on labels smoothed by 0.4 already. The attack
            sees the labels as they are.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if label_factor does not leave the right class the largest label or, at the first batch, the attack takes no
            gradient at its start.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        smoothing: ConvergeSmooth | None = None,
        label_factor: float | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_label_factor(label_factor, num_classes)
        self.smoothing = ConvergeSmooth() if smoothing is None else smoothing
        self.label_factor = label_factor

    @staticmethod
    def default_attack() -> NoisyFGSM:
        return NoisyFGSM(8 / 255, k=1.0)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> JudgedExample:
        return JudgedExample(**vars(run_from(self, self.clean(batch), eps)))

    def loss(self, example: JudgedExample) -> Tensor:
        y = example.y
        if self.label_factor is not None:
            y = relaxed_labels(y, self.num_classes, self.label_factor, example.x.dtype)
        benign = self.smoothing.term(example, lambda: logits_at_start(self, example), y, self.current_epoch)
        return F.cross_entropy(self(example.x_adv), y) + benign

    def after_step(self, example: JudgedExample) -> None:
        self.smoothing.add(example.judged, self.current_epoch)
