"""Distributions of viewpoints of all training objects, as the state of a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...callbacks.viewpoints.distribution import ViewDistribution
from ...scenes.view_space import ViewSpace
from ..late_buffers import LateBuffers

_TINY = 1e-12


class DistributionPool(LateBuffers):
    """A mixture of K Gaussians over u in D coordinates for each of N objects.

    Buffers ``weights`` (N, K), or (N, K, D) where each coordinate has its own, ``mean`` and ``sigma`` (N, K, D), and ``epoch``
    (N,), in which a mixture was last found; empty until the first ones are found or a checkpoint holds some. What they mean:
    :class:`robust_pl.callbacks.ViewDistribution`.
    """

    weights: Tensor
    mean: Tensor
    sigma: Tensor
    epoch: Tensor

    def __init__(self) -> None:
        super().__init__("weights", "mean", "sigma", "epoch")

    @property
    def last(self) -> int:
        """Epoch of the last change; -1 where there is nothing yet."""
        return -1 if self.empty else int(self.epoch.max())

    def distribution(self, rows: Tensor, ids: Sequence[str], space: ViewSpace) -> ViewDistribution:
        """Those of objects ``rows`` (M,), whose names are ``ids``."""
        mixture = "joint" if self.weights.dim() == 2 else "per_dim"
        return ViewDistribution(self.weights[rows], self.mean[rows], self.sigma[rows], space, ids, mixture)

    def put(self, rows: Tensor, found: ViewDistribution, epoch: int) -> None:
        """Take what was found for objects ``rows`` (M,); the first time those must be all, in order."""
        if self.empty:
            parts = {name: tensor.clone() for name, tensor in found.to(self.mean.device).tensors().items()}
            self.begin(**parts, epoch=self.epoch.new_full((len(rows),), float(epoch)))
            return
        for name, tensor in found.tensors().items():
            buffer = getattr(self, name)
            buffer[rows] = tensor.to(buffer)
        self.epoch[rows] = float(epoch)

    def draw(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """One u (M, D) from the mixture of each of ``rows`` (M,).

        Args:
            rows: int64, on the CPU.
            numbers: from U[0, 1), float64 (M, 2, D) on the CPU: which component, for a joint mixture from the first coordinate,
                and where in it.
        """
        weights, mean, sigma = self.weights[rows], self.mean[rows], self.sigma[rows]
        choice = numbers[:, 0].to(mean)
        if weights.dim() == 2:
            weights, choice = weights.unsqueeze(2), choice[:, :1]
        chosen = (choice.unsqueeze(1) >= weights.cumsum(1)[:, :-1]).sum(1, keepdim=True).expand(-1, 1, mean.shape[2])
        noise = torch.special.ndtri(numbers[:, 1].clamp(_TINY, 1 - _TINY)).to(mean)
        return mean.gather(1, chosen).squeeze(1) + sigma.gather(1, chosen).squeeze(1) * noise
