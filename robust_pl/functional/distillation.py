"""Losses and balances of robust distillation, as pure functions.

Logits have shape (B, K); a teacher's are given without a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .fairness import class_gaps
from .losses import hard, kl_divergence

KLReduction = Literal["batchmean", "mean"]
KL_REDUCTIONS: tuple[KLReduction, ...] = ("batchmean", "mean")
_EQUAL = 1e-4


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """t^2 KL(softmax(teacher / t) || softmax(student / t)) of each sample, (B,) (Hinton et al. 2015, arXiv 1503.02531)."""
    return temperature**2 * kl_divergence(logits / temperature, teacher_logits / temperature)


def reduce_kl(each: Tensor, num_classes: int, reduction: KLReduction = "batchmean") -> Tensor:
    """Divergences of samples, (B, ...), as one number, (...).

    ``batchmean`` is their mean. ``mean`` is the mean over batch *and* classes that many public codes take: K times smaller, so
    that a learning rate and weights of other terms that were tuned with it do not fit the other.
    """
    return each.mean(0) / (num_classes if reduction == "mean" else 1)


def trust(teacher_logits: Tensor, y: Tensor, beta: float) -> Tensor:
    """softmax(teacher)_y ** beta of each sample, (B,), in [0, 1] (Zhu et al. 2022, arXiv 2106.04928).

    Mixed labels count as their largest entry.
    """
    log_p = teacher_logits.log_softmax(1).gather(1, hard(y).unsqueeze(1)).squeeze(1)
    return (beta * log_p).exp()


def introspection(logits_adv: Tensor, logits: Tensor, trusted: Tensor) -> Tensor:
    """(1 - trusted) * KL(S(x) || S(x_adv)) of each sample, (B,): where the teacher is not trusted, the student asks itself."""
    return (1 - trusted) * kl_divergence(logits_adv, logits)


def balance_losses(weights: Tensor, losses: Tensor, first: Tensor, rate: float, beta: float = 1.0) -> Tensor:
    """MTARD's dynamic weights of several losses (Zhao et al. 2022, arXiv 2306.16170), (n,), summing to 1.

    With r_i = (losses_i / first_i) ** beta, each weight goes the share ``rate`` of the way to r_i / sum of r: what was learned
    more slowly gets more weight. B-MTARD's normalisation loss balance divides r by its mean first, which cancels: it is this
    one with beta = 1.

    Args:
        weights: of the losses so far, (n,), summing to 1.
        losses: now, (n,), above 0.
        first: at the first step, (n,), above 0.
        rate: in [0, 1].
        beta: how strongly weights follow the ratios.
    """
    tiny = torch.finfo(losses.dtype).tiny
    relative = (losses / first.clamp_min(tiny)).pow(beta)
    return weights - rate * (weights - relative / relative.sum().clamp_min(tiny))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) of each sample in nats, (B,)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def balance_entropies(temperatures: Tensor, entropies: Tensor, rate: float, low: float = 1.0, high: float = 10.0) -> Tensor:
    """B-MTARD's entropy-based balance (Zhao et al. 2024, arXiv 2306.16170): temperatures (2,) of two teachers after a step.

    The teacher of the larger entropy is sharpened by ``rate``, the other softened by as much, and both stay in [low, high].

    Args:
        temperatures: so far, (2,).
        entropies: mean entropies of the softened predictions, (2,).
        rate: size of the step.
        low: smallest temperature.
        high: largest temperature.
    """
    ratio = entropies / entropies.flip(0).clamp_min(torch.finfo(entropies.dtype).tiny)
    return (temperatures - rate * (ratio - 1).sign()).clamp(low, high)


def class_temperatures(temperatures: Tensor, errors: Tensor, rate: float, low: float = 0.5, high: float = 5.0) -> Tensor:
    """ABSLD's class-wise temperatures after an epoch (Zhao et al. 2024, arXiv 2312.05508), (K, n).

    gap_c = error_c - mean error; tau_c - rate * gap_c / max |gap|, in [low, high]: a class with more than the average error
    gets sharper labels. A class that did not occur, whose error is nan, keeps its own and is in no mean.

    Args:
        temperatures: so far, (K, n): of K classes in n terms of the loss.
        errors: mean cross-entropy of each class, (K, n).
        rate: size of the largest step.
        low: smallest temperature.
        high: largest temperature.
    """
    gaps = class_gaps(errors)
    # What classes of equal errors differ by is rounding, which must not be blown up.
    largest = torch.maximum(gaps.abs().amax(0), _EQUAL * errors.nanmean(0)).clamp_min(torch.finfo(gaps.dtype).tiny)
    return (temperatures - rate * gaps / largest).clamp(low, high)
