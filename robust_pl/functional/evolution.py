"""Natural evolution strategies for Gaussians and mixtures of them, and the entropy of what tanh makes of a Gaussian.

Fitness f(u) is maximised in expectation over u = mean + sigma * r, r ~ N(0, 1), in D coordinates, of N problems at once. Points
come in antithetic pairs mean + offset and mean - offset with offset = sigma * r (Sehnke et al. 2010, PEPG). In a mixture of K
Gaussians each pair belongs to a component, in all coordinates or in each coordinate to its own.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .viewpoints import log_tanh_slope

_NODES = 32


def centred_ranks(fitness: Tensor) -> Tensor:
    """Ranks of each row of (N, P) spread over [-0.5, 0.5]; equal values share the mean of their ranks.

    With ranks in the order of their places, a flat landscape would push along the order in which points are listed.

    Raises:
        ValueError: if a row has less than two values.
    """
    if fitness.shape[-1] < 2:
        raise ValueError(f"fitness of shape {tuple(fitness.shape)} cannot be ranked: give at least two values a row")
    ordered, values = fitness.sort(-1).values, fitness.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return ((below + up_to - 1).to(fitness.dtype) / 2) / (fitness.shape[-1] - 1) - 0.5


def natural_gradient_mean(ahead: Tensor, behind: Tensor, offset: Tensor, member: Tensor) -> Tensor:
    """Estimate of sigma^2 dE[f]/dmean, the natural gradient of each component's mean, (N, K, D).

    The mean over a component's pairs of (f+ - f-) / 2 * offset, since dE[f]/dmean = E[f r / sigma] and the Fisher information
    of the mean is 1 / sigma^2. Zero where a component has no pair.

    Args:
        ahead: fitness (N, J) of mean + offset.
        behind: fitness (N, J) of mean - offset.
        offset: (N, J, D).
        member: whether a pair belongs to a component, 0 or 1, (N, J, K, D), or (N, J, K, 1) for all coordinates.
    """
    slope = ((ahead - behind) / 2).unsqueeze(-1) * offset
    return (member * slope.unsqueeze(2)).sum(1) / member.sum(1).clamp_min(1.0)


def natural_gradient_sigma(
    ahead: Tensor, behind: Tensor, offset: Tensor, member: Tensor, sigma: Tensor, baseline: Tensor
) -> Tensor:
    """Estimate of sigma^2 / 2 * dE[f]/dsigma, the natural gradient of each component's sigma, (N, K, D).

    Half the mean over a component's pairs of ((f+ + f-) / 2 - baseline) * (offset^2 - sigma^2) / sigma, since dE[f]/dsigma =
    E[f (r^2 - 1) / sigma] and the Fisher information of sigma is 2 / sigma^2.

    Args:
        ahead: see :func:`natural_gradient_mean`, and ``behind``, ``offset`` and ``member`` likewise.
        behind: fitness.
        offset: (N, J, D).
        member: (N, J, K, D) or (N, J, K, 1).
        sigma: (N, K, D).
        baseline: what is subtracted from the fitness of a component's pairs, (N, K); that of its mean makes the noise small.
    """
    height = ((ahead + behind) / 2).unsqueeze(-1) - baseline.unsqueeze(1)  # (N, J, K)
    spread = (offset.square().unsqueeze(2) - sigma.square().unsqueeze(1)) / sigma.unsqueeze(1)
    return (member * height.unsqueeze(-1) * spread).sum(1) / (2 * member.sum(1).clamp_min(1.0))


def natural_gradient_weights(value: Tensor, weights: Tensor) -> Tensor:
    """Natural gradient of sum_k w_k value_k over the simplex: w_k (value_k - sum_l w_l value_l), which adds up to zero.

    Args:
        value: of each component, (N, K, ...).
        weights: that sum to 1 over dim 1, (N, K, ...).
    """
    return weights * (value - (weights * value).sum(1, keepdim=True))


def tanh_gaussian_entropy(mean: Tensor, sigma: Tensor) -> Tensor:
    """Entropy in nats of tanh(mean + sigma r), r ~ N(0, 1), for each entry (...).

    H = log sigma + log(2 pi e) / 2 + E[log(1 - tanh(mean + sigma r)^2)]; the expectation by Gauss-Hermite quadrature. The most
    that a mean of 0 reaches is 0.683 at sigma 0.87, below the log 2 of the uniform distribution on [-1, 1].
    """
    nodes, weights = _quadrature(mean)
    slope = log_tanh_slope(mean.unsqueeze(-1) + sigma.unsqueeze(-1) * nodes)
    return sigma.log() + 0.5 * math.log(2 * math.pi * math.e) + (slope * weights).sum(-1)


def tanh_gaussian_entropy_gradients(mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """dH/dmean = -2 E[tanh(mean + sigma r)] and dH/dsigma = 1 / sigma - 2 E[r tanh(mean + sigma r)], (...) each.

    Of :func:`tanh_gaussian_entropy`, by the same quadrature, so without noise; ViewFool's code takes the mean over the
    population's r instead.
    """
    nodes, weights = _quadrature(mean)
    bent = (mean.unsqueeze(-1) + sigma.unsqueeze(-1) * nodes).tanh() * weights
    return -2 * bent.sum(-1), 1 / sigma - 2 * (bent * nodes).sum(-1)


def _quadrature(like: Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights = _hermite()
    return torch.as_tensor(nodes).to(like), torch.as_tensor(weights).to(like)


@cache
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for expectations over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights / weights.sum()
