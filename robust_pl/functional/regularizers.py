"""Terms that single-step training adds to its loss, so that it does not overfit to its own attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import wide


def gradient_alignment(gradient: Tensor, other: Tensor) -> Tensor:
    """GradAlign (Andriushchenko and Flammarion 2020, arXiv 2007.02617): 1 - mean cosine between input gradients, a scalar.

    Samples of which either gradient is zero are left out of the mean, as in the authors' code; where all are, it is 0.

    Args:
        gradient: (B, ...).
        other: (B, ...).
    """
    a, b = wide(gradient).flatten(1), wide(other).flatten(1)
    alive = (a.detach().abs().amax(1) > 0) & (b.detach().abs().amax(1) > 0)
    # A cosine of zero vectors has no derivative, and times 0 that still is NaN.
    a, b = (t.where(alive.unsqueeze(1), 1.0) for t in (a, b))
    # Unit vectors first: products of input gradients underflow.
    a, b = (t / t.detach().abs().amax(1, keepdim=True) for t in (a, b))
    distance = (1 - F.cosine_similarity(a, b, dim=1)) * alive
    return distance.sum() / alive.sum().clamp_min(1)


def lipschitz(
    logits: Tensor,
    features: Tensor,
    logits_ref: Tensor,
    features_ref: Tensor,
    x: Tensor,
    x_ref: Tensor,
    c: float = 0.125,
) -> Tensor:
    """FGSM-LAW's regulariser (Jia et al. 2024, arXiv 2308.11443): change of outputs and features over change of pixels.

    (MSE(softmax logits) + MSE(softmax features)) / (MSE(x) + c), each a mean over all entries, a scalar. At 8/255 the MSE of
    pixels is below 0.001, so that c alone decides the denominator. The gradient flows through both sides.

    Args:
        logits: (B, K), of x.
        features: (B, D), of x; the softmax is over D.
        logits_ref: of the reference point.
        features_ref: likewise.
        x: pixels (B, C, H, W).
        x_ref: pixels of the reference point.
        c: added to the denominator.
    """
    outputs = F.mse_loss(wide(logits).softmax(1), wide(logits_ref).softmax(1))
    inner = F.mse_loss(wide(features).softmax(1), wide(features_ref).softmax(1))
    return (outputs + inner) / (F.mse_loss(wide(x), wide(x_ref)) + c)


def relaxed_labels(y: Tensor, num_classes: int, factor: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels with ``factor`` on the right class and the rest on all others alike, (B, K).

    Labels (B, K) that are mixed or smoothed already are relaxed once more, as the linear map of one-hot labels takes them:
    y' = factor * y + (1 - factor) * (1 - y) / (K - 1). Smoothed by 0.4 and then by factor 0.6, the right class of 10 has 0.4.
    """
    y = y.to(dtype) if y.is_floating_point() else F.one_hot(y, num_classes).to(dtype)
    return y * factor + (1 - y) * (1 - factor) / (num_classes - 1)


def abnormality(
    drop: Tensor,
    shift: Tensor,
    abnormal: Tensor,
    loss_weight: float,
    output_weight: float,
    mean: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """AAER's regulariser (Lin et al. 2023, arXiv 2404.08154) of samples whose loss an attack lowered, a scalar.

    (n / B) * [loss_weight * D + output_weight * max(V_A - V_N, 0)] for n abnormal ones of B, with D the mean drop of abnormal
    samples and V_A and V_N the mean shifts of abnormal and of all others; 0 where either set is empty. The gradient flows
    through D and V_A, where ``drop`` and ``shift`` have one, and not through V_N.

    Args:
        drop: by how much the attack lowered the loss, (B,).
        shift: squared distance of the outputs before and after it, (B,).
        abnormal: which samples are, bool (B,).
        loss_weight: lambda_2 of the paper.
        output_weight: lambda_3.
        mean: over processes, of sums. Counts and V_N then are those of all samples, and the mean of what the processes return
            is the regulariser of all.
    """
    mask = abnormal.to(shift.dtype)
    drops, shifts = (mask * drop).sum(), (mask * shift).sum()
    sums = torch.stack([mask.sum(), (1 - mask).sum(), shifts.detach(), ((1 - mask) * shift.detach()).sum()])
    n, others, all_shifts, other_shifts = mean(sums).unbind()
    both = (n > 0) & (others > 0)
    some, share = n.where(both, 1.0), n / (n + others)
    normal_shift = other_shifts / others.where(both, 1.0)
    excess = (shifts / some - normal_shift).where(all_shifts / some > normal_shift, 0.0)
    return share * (loss_weight * drops / some + output_weight * excess).where(both, 0.0)


def linearity_error(first: Tensor, second: Tensor, between: Tensor, share: Tensor) -> Tensor:
    """ELLE's squared error of a linear loss (Abad Rocamora et al. 2024, arXiv 2401.11618) of each sample, (B,).

    [l(x_c) - (1 - a) l(x_a) - a l(x_b)]^2 for x_c = (1 - a) x_a + a x_b; the gradient flows through all three.

    Args:
        first: loss at x_a, (B,).
        second: loss at x_b, (B,).
        between: loss at x_c, (B,).
        share: a in [0, 1], (B,).
    """
    return (between - (1 - share) * first - share * second).square()
