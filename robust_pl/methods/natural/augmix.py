"""AugMix, with its consistency loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...data.augmentations import Augmentation
from ...data.augmix import AugMixChains
from ...functional.output_distances import jensen_shannon
from ..base import OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .augmented import AugmentedTraining


class AugMix(AugmentedTraining):
    """AugMix (Hendrycks et al. 2020, arXiv 1912.02781): cross-entropy on images, and outputs alike for two versions of each.

    With p, p1 and p2 the softmax outputs for an image and for two augmented versions of it, of one forward pass in which they
    share BatchNorm's statistics,

        CE(p, y) + weight * JSD(p, p1, p2),

    where gradients flow through all three. Without this loss, augmented images alone are the data's list ``augment``. With
    :class:`robust_pl.data.PRIME` as augmentation it is PRIME's consistency loss. With an attack, images and versions are all
    attacked, each for itself, before the loss is taken: a combination of ours. The network's own dropout is as in training.

    Cost: one forward and one backward pass on three times the batch, 3 + 3, and two mixtures of chains; with an attack three
    times its passes as well.

    Args:
        net: see :class:`Method`, and so all others.
        attack: see :class:`AugmentedTraining`.
        augmentation: makes a version; None takes AugMix's at severity 3, as on CIFAR.
        weight: of the divergence; 12 is the authors'.
        seed: of the versions; None takes that of the data module.

    Raises:
        ValueError: if the weight is negative, or the augmentation mixes labels.
    """

    versions = 2

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        augmentation: Augmentation | None = None,
        weight: float = 12.0,
        seed: int | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, augmentation, seed, optimizer, schedule, weights, num_classes)
        if weight < 0:
            raise ValueError(f"weight={weight} must be at least 0")
        self.weight = weight

    @staticmethod
    def default_augmentation() -> AugMixChains:
        return AugMixChains()

    def loss(self, example: Example) -> Tensor:
        logits = self.logits(example)
        return F.cross_entropy(logits[0], self.labels(example)) + self.weight * jensen_shannon(*logits)
