"""FGSM-MEP-CS."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ..base import OptimizerFactory
from ..per_sample import Storage
from ..schedules import Schedule
from .converge_smooth import ConvergeSmooth, Judged
from .prior import PriorExample, PriorGuided, with_momentum
from .started import StartedExample


@dataclass
class JudgedPriorExample(Judged, PriorExample):
    """A batch with its next prior, and the weight of its benign loss."""


class FGSMMEPCS(PriorGuided):
    """FGSM-MEP-CS (Zhao et al. 2023, ICCV): the attack of :class:`FGSMPGI`, with a loss that is kept smooth over epochs.

    L = CE(f(x_adv), y) + w * CE(f(x), y), where w is 1, 0 or -1, see :class:`ConvergeSmooth`. Perturbations and momenta are
    kept of each sample and followed as in :class:`FGSMPGI`, whose start is cut to [0, 1], which the authors do not. Their
    regularisers of outputs, switched off by default, are left out, and so nothing is compared with the start.

    Cost: three forward and three backward passes a step, and two of the latter where the smoothing is off; and the memory of
    two images a training sample, which processes share.

    Args:
        smoothing: by default as the authors have it for their schedule of 110 epochs.
        decay: of the momentum.
        label_factor: see :class:`PriorGuided`; a public benchmark (Pan and Yao 2026, arXiv 2604.22853) takes 0.6 on labels that
            are smoothed by 0.4 already.
        reset_every: epochs after which perturbations and momenta begin anew.
        net: see :class:`PriorGuided`, and so all others.

    Raises:
        TypeError: see :class:`PriorGuided`.
        ValueError: if decay is negative, and see :class:`PriorGuided`.
    """

    columns = ("perturbation", "momentum")
    compares = False

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        smoothing: ConvergeSmooth | None = None,
        decay: float = 0.3,
        label_factor: float | None = None,
        reset_every: int | None = 40,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, label_factor, reset_every, storage, optimizer, schedule, weights, num_classes)
        if decay < 0:
            raise ValueError(f"decay={decay} must be at least 0")
        self.smoothing = ConvergeSmooth() if smoothing is None else smoothing
        self.decay = decay

    def next_prior(self, example: StartedExample, kept: Tensor, radius: float | Tensor) -> Tensor:
        return with_momentum(self, example, kept, radius, self.decay)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> JudgedPriorExample:
        return JudgedPriorExample(**vars(super().craft(batch, eps)))

    def loss(self, example: JudgedPriorExample) -> Tensor:
        loss = F.cross_entropy(self(example.x_adv), example.y)
        return loss + self.smoothing.term(example, lambda: self(example.x), example.y, self.current_epoch)

    def after_step(self, example: JudgedPriorExample) -> None:
        super().after_step(example)
        self.smoothing.add(example.judged, self.current_epoch)
