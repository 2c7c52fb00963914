"""What NuAT and GAT share: one step guided by how far it moves the outputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack, ObjectiveName
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.prepare import prepared
from ...callbacks.attacks.problem import Objective
from ...functional.losses import cross_entropy
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class GuidedFGSM(Method):
    """Base of single-step methods whose attack and loss share a distance d between the outputs for two images.

    With z = f(x), the attack takes one step of eps from x +- eps / 2. In batches 0, 2, ... of an epoch it maximises
    CE(f(x_adv), y), in batches 1, 3, ... CE(f(x_adv), y) + weight * d(z, f(x_adv)). The loss is
    CE(f(x), y) + weight * d(f(x), f(x_adv)): clean cross-entropy alone, and no gradient is stopped. A subclass defines
    :meth:`distance` and :meth:`weight`. Batches are counted as the trainer counts them, so also where gradients are
    accumulated, and as before after a resume.

    Without an attack it takes that FGSM at 8/255, with the network in eval mode; z is seen in train mode and moves the
    statistics of BatchNorm. So do the authors' codes, which however compute z in each batch, where this is done only in those
    that use it.

    Cost: three forward and three backward passes a step, and in every other one a forward pass for z, which counts as one of
    the attack's. That of a weight perturbation comes on top.

    Args:
        lmbda: weight of the distance.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if lmbda is negative, or the attack names an objective, which would take the place of the guidance.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None,
        lmbda: float,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if self.attack.objective is not None:
            raise ValueError(
                f"attack.objective={self.attack.objective!r} would take the place of what guides the attack of "
                f"{type(self).__name__}: leave it out"
            )
        self.lmbda = lmbda
        self._guided = False

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, random_start="bernoulli")

    @abstractmethod
    def distance(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """Between the outputs for clean and for attacked samples, (B, K) each; a scalar, as if averaged over samples."""

    @abstractmethod
    def weight(self) -> float:
        """Of the distance, in the running epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._guided = batch_idx % 2 == 1

    def attack_objective(self, example: Example) -> ObjectiveName | Objective:
        if not self._guided:
            return "ce"
        weight = self.weight()
        with prepared(self, "train"), torch.no_grad():
            clean = self(example.x)
        self.attack.forwards += len(clean)

        def guided(logits: Tensor, y: Tensor, clean: Tensor) -> Tensor:
            # An attack adds this up over the batch: B times the mean cross-entropy plus the weighted distance.
            return cross_entropy(logits, y) + weight * self.distance(clean, logits)

        return Objective(guided, (example.y, clean))

    def loss(self, example: Example) -> Tensor:
        logits, logits_adv = self(example.x), self(example.x_adv)
        return F.cross_entropy(logits, example.y) + self.weight() * self.distance(logits, logits_adv)
