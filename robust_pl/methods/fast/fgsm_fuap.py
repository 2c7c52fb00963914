"""FGSM-FUAP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import Number, check_count
from ...callbacks.attacks.draws import seed_from
from ...callbacks.attacks.penultimate import Penultimate
from ...callbacks.attacks.prepare import prepared
from ...functional.losses import wide
from ..base import OptimizerFactory
from ..schedules import Schedule
from .clusters import Clusters
from .crafting import draws_of, radius_of
from .fgsm_uap import FGSMUAP, GroupedExample


@dataclass
class ClusteredExample(GroupedExample):
    """A batch with the features by which its samples were grouped.

    Args:
        features: of noisy samples, (B, D).
    """

    features: Tensor | None = None


class FGSMFUAP(FGSMUAP):
    """FGSM-FUAP (Pan, Li and Yao, AAAI 2024): :class:`FGSMUAP` with one universal perturbation for each cluster of features.

    Noise U(-eps, eps) is added first and cut to the box; the features of that image, what the last linear layer reads, say its
    cluster, see :class:`robust_pl.methods.fast.clusters.Clusters`. Then the cluster's perturbation is added, and the sum cut to
    the ball and the box. The clusters' weights learn from each step once, with the labels of the loss, by an Adam of their own;
    they are in no optimizer, average or weight perturbation of the network. A compiled network is refused.

    Cost: three forward and three backward passes a step; the first, of the noisy image, has no gradient. It is in the
    attack's ``bn_mode``: ``train``, as the authors have it, moves the running statistics of BatchNorm once more.

    Args:
        clusters: M; the authors take 50 for CIFAR-10, 200 for CIFAR-100, and for Tiny-ImageNet 300.
        cluster_lr: learning rate of Adam.
        layer: name of the last linear layer, whose inputs are the features; None finds it, see
            :class:`robust_pl.callbacks.attacks.penultimate.Penultimate`.
        net: see :class:`FGSMUAP`, and so all others.

    Raises:
        ValueError: if an argument is out of its range, or, at the first batch, the network has no such layer.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        clusters: int = 50,
        cluster_lr: float = 1e-3,
        layer: str | None = None,
        uap_eps: Number = 10 / 255,
        lmbda: float = 10.0,
        decay: float = 0.3,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, uap_eps, lmbda, decay, optimizer, schedule, weights, num_classes)
        check_count("clusters", clusters)
        if cluster_lr <= 0:
            raise ValueError(f"cluster_lr={cluster_lr} must be above 0")
        self.layer = layer
        self.clusters = Clusters(clusters, num_classes, cluster_lr)

    def perturbations(self) -> int:
        return self.clusters.clusters

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> ClusteredExample:
        example = self.clean(batch)
        x = wide(example.x)
        radius, draws = radius_of(self, x, eps), draws_of(self, "fuap", x.device)
        noisy = (x + radius * (2 * draws.uniform(x) - 1)).clamp(0.0, 1.0)
        with prepared(self, self.attack.bn_mode), torch.no_grad():
            features = wide(Penultimate(self, self.layer)(noisy.to(example.x.dtype))[0])
        self.attack.forwards += len(x)
        if self.clusters.empty:
            self.clusters.begin_at(features, seed_from(self.attack.seed, "clusters"))
        group = self.clusters.scores(features).argmax(1)
        return ClusteredExample(**vars(self.attacked(example, radius, noisy, group)), features=features)

    def after_step(self, example: ClusteredExample) -> None:
        super().after_step(example)
        self.clusters.learn(example.features, example.y)
