"""What single channels of a convolution do: their activity on two inputs, and the spread of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12
BIMODAL = 5 / 9
"""Sarle's coefficient of a uniform distribution; above it there may be two modes."""


def channel_ratio(activation_adv: Tensor, activation: Tensor) -> Tensor:
    """How much more active each channel is on attacked inputs: mean |a_c(x_adv)| over mean |a_c(x)|, (B, C, ...) twice -> (C,).

    After He et al. 2023 (arXiv 2302.11963), who find that channels which recognise the perturbation itself come to dominate;
    this statistic is ours. A channel that is silent on both has ratio 1.
    """
    others = [d for d in range(activation.dim()) if d != 1]
    adv, clean = (a.double().abs().mean(others) for a in (activation_adv, activation))
    return (adv + _TINY) / (clean + _TINY)


def channel_norms(weight: Tensor) -> Tensor:
    """l2 norm of the weights of each output channel, (C, ...) -> (C,)."""
    return weight.detach().double().flatten(1).norm(dim=1)


def bimodality(values: Tensor) -> Tensor:
    """Sarle's coefficient (skewness^2 + 1) / kurtosis of values (N,), a scalar in (0, 1]: 1 for two points, 1/3 for a Gaussian.

    Of the population, without corrections for small N; 0 where all values are equal. See :data:`BIMODAL`.
    """
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    spread = variance.sqrt().clamp_min(_TINY)
    skewness, kurtosis = ((centred / spread) ** 3).mean(), ((centred / spread) ** 4).mean()
    return torch.where(variance > _TINY**2, (skewness.square() + 1) / kurtosis.clamp_min(_TINY), 0.0)
