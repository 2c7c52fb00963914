"""Distances between the outputs of a batch for two versions of its images; the gradient flows through both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .losses import wide


def nuclear_distance(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Nuclear norm of the difference, the sum of the singular values of the matrix (B, K); a scalar.

    It is between the Frobenius norm and sqrt(min(B, K)) times that, so for a given change of each sample it grows with the
    square root of the batch, and by more where the samples change in different directions. The gradient is U V^T of the
    singular value decomposition, which is bounded also where singular values are zero or alike. Computed in float32 if in half
    precision, with autocast off. The decomposition makes a GPU wait.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return torch.linalg.svdvals(wide(logits) - wide(logits_adv)).sum()


def softmax_distance(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Squared euclidean distance between the softmax outputs of a sample, averaged over the batch; a scalar in [0, 2]."""
    return (wide(logits).softmax(1) - wide(logits_adv).softmax(1)).square().sum(1).mean()


def jensen_shannon(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the softmax outputs p_1, ..., p_n, averaged over the batch; a scalar in [0, log n].

    mean_i KL(p_i || m) with m = mean_i p_i, whose logarithm is taken from those of the p_i, so that probabilities which
    underflow do no harm; AugMix's code clamps m to 1e-7 instead. Half precision is computed in float32.
    """
    p = torch.stack([wide(one).log_softmax(1) for one in logits])
    m = p.logsumexp(0) - math.log(len(p))
    return (p.exp() * (p - m)).sum(2).mean()
