"""FGSM-LAW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import choose
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.penultimate import Penultimate
from ...callbacks.weights.ema import EMA
from ...functional.losses import hard
from ...functional.regularizers import lipschitz, relaxed_labels
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .arguments import check_label_factor

Reference = Literal["clean", "start"]


@dataclass
class ReferredExample(Example):
    """A batch with the point that attacked outputs are compared with.

    Args:
        reference: pixels (B, C, H, W).
        right: whether the attacked sample and the reference were classified rightly, (B, 2); written where the loss is first
            asked, at the weights of the step.
    """

    reference: Tensor | None = None
    right: Tensor | None = None


class FGSMLAW(Method):
    """FGSM-LAW (Jia et al. 2024, arXiv 2308.11443): FGSM adversarial training with Lipschitz regularisation and an average of
    the weights that leaves unsafe steps out.

    Loss: cross-entropy of attacked samples with relaxed labels + lmbda * the change of outputs and features over that of
    pixels, see :func:`robust_pl.functional.regularizers.lipschitz`. A step is averaged only if attacked samples are right less
    than ``accept_below`` times as often as reference samples: where single-step training collapses, its own attack gets
    easy and the average stands still. The method brings that average, an :class:`robust_pl.callbacks.EMA` of decay 0.999,
    unless the trainer has an EMA; it is what the authors evaluate. Without an attack it takes their FGSM at 8/255 from
    x +- eps / 2, in train mode; their attack takes the softmax twice, ours once. They train with Cutout. Mixed labels count as
    their largest entry. A compiled network is refused, since it does not show its features.

    Cost: three forward and three backward passes a step; the paper's second variant would spare one of each by using the pass
    of the attack's start again, where ours takes it anew, so that the loss stays a function of the weights.

    Args:
        lmbda: weight of the regulariser; the authors take 12 on CIFAR-10 and 42 on CIFAR-100.
        reference: ``clean`` samples, as on CIFAR-10, or the attack's ``start``, as on CIFAR-100.
        label_factor: label of the right class; 0.7 on CIFAR-10, 0.5 on CIFAR-100.
        accept_below: 0.82 on CIFAR-10, 0.55 on CIFAR-100.
        layer: name of the last linear layer, whose inputs are the features; None finds it, see
            :class:`robust_pl.callbacks.attacks.penultimate.Penultimate`.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of its range, or, at the first batch, the network has no such layer.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 12.0,
        reference: Reference = "clean",
        label_factor: float = 0.7,
        accept_below: float = 0.82,
        layer: str | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        choose("reference", reference, ("clean", "start"))
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        check_label_factor(label_factor, num_classes)
        if accept_below <= 0:
            raise ValueError(f"accept_below={accept_below} would accept no step: choose from above 0")
        self.lmbda, self.reference, self.label_factor, self.accept_below = lmbda, reference, label_factor, accept_below
        self.layer = layer
        self._right = torch.zeros(2)

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, random_start="bernoulli", bn_mode="train")

    def configure_callbacks(self) -> Sequence[Callback]:
        averaged = any(isinstance(callback, EMA) for callback in self.trainer.callbacks)
        return [] if averaged else [EMA(0.999, buffers="average")]

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> ReferredExample:
        example = self.clean(batch)
        attacked = self.run_attack(example, eps)
        x = example.x
        reference = x if self.reference == "clean" else attacked.start.to(x.dtype)
        return ReferredExample(x, example.y, example.index, attacked.x_adv.to(x.dtype), reference)

    def loss(self, example: ReferredExample) -> Tensor:
        see = Penultimate(self, self.layer)
        features, logits = see(example.x_adv)
        features_ref, logits_ref = see(example.reference)
        y = hard(example.y)
        if example.right is None:
            example.right = torch.stack([out.argmax(1) == y for out in (logits, logits_ref)], 1)
        loss = F.cross_entropy(logits, relaxed_labels(y, self.num_classes, self.label_factor, logits.dtype))
        change = lipschitz(logits, features, logits_ref, features_ref, example.x_adv, example.reference)
        return loss + self.lmbda * change

    def after_step(self, example: ReferredExample) -> None:
        self._right = example.right.float().sum(0)

    def averaging_weight(self) -> Tensor:
        right = self._right.clone()  # there may be several averages
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(right)
        return (right[0] < self.accept_below * right[1]).float()
