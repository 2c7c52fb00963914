"""Clusters of features that a small classifier learns beside the network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...callbacks.attacks.draws import StreamDraws
from ..late_buffers import LateBuffers
from ..ranks import mean_over_ranks

_BETAS, _TINY = (0.9, 0.999), 1e-8


class Clusters(LateBuffers):
    """Scores s = W1 h + b1 of features h, whose largest is the cluster, trained by CE(W2 relu(s) + b2, y) with Adam.

    Everything is a buffer, Adam's moments as well: no optimizer, average, weight perturbation or gradient reducer of the
    network sees it, and a checkpoint holds it. It begins as two linear layers do, at U(-1, 1) / sqrt(inputs).

    Args:
        clusters: M.
        num_classes: K.
        lr: of Adam (Kingma and Ba 2015, arXiv 1412.6980), with its usual betas.
    """

    def __init__(self, clusters: int, num_classes: int, lr: float) -> None:
        super().__init__("weights", "moments", "steps")
        self.clusters, self.num_classes, self.lr = clusters, num_classes, lr

    def begin_at(self, features: Tensor, seed: int) -> None:
        """Draw the first weights for features like these, (B, D)."""
        inputs, (m, k) = features.shape[1], (self.clusters, self.num_classes)
        bound = torch.cat(
            [features.new_full((m * (inputs + 1),), inputs**-0.5), features.new_full((k * (m + 1),), m**-0.5)],
        )
        weights = bound * (2 * StreamDraws(seed, features.device).uniform(bound) - 1)
        self.begin(weights=weights, moments=torch.zeros_like(weights).repeat(2, 1), steps=weights.new_zeros(1))

    def scores(self, features: Tensor) -> Tensor:
        """(B, M) of features (B, D)."""
        w1, b1, _, _ = self._layers(self.weights)
        with torch.autocast(features.device.type, enabled=False):  # in bf16 other clusters would win than those that learn
            return F.linear(features, w1, b1)

    def learn(self, features: Tensor, y: Tensor) -> None:
        """One step of Adam on the samples of all processes; labels (B,), or (B, K) if mixed."""
        with torch.enable_grad():
            weights = self.weights.detach().requires_grad_()
            w1, b1, w2, b2 = self._layers(weights)
            loss = F.cross_entropy(F.linear(F.linear(features, w1, b1).relu(), w2, b2), y)
            gradient = mean_over_ranks(torch.autograd.grad(loss, weights)[0])
        with torch.no_grad():
            self.steps += 1
            first, second = self.moments
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient.square(), 1 - _BETAS[1])
            # Divided by 1 - beta ** steps, without waiting for the device.
            mean, square = (
                moment / -torch.expm1(self.steps * math.log(beta)) for moment, beta in zip((first, second), _BETAS, strict=True)
            )
            self.weights -= self.lr * mean / (square.sqrt() + _TINY)

    def _layers(self, weights: Tensor) -> list[Tensor]:
        m, k = self.clusters, self.num_classes
        inputs = (len(weights) - k * (m + 1)) // m - 1
        parts = weights.split([m * inputs, m, k * m, k])
        return [part.view(shape) for part, shape in zip(parts, [(m, inputs), (m,), (k, m), (k,)], strict=True)]
