"""Terms that single-step training adds to its loss, so that it does not overfit to its own attack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import hard, wide


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
    """Labels with ``factor`` on the right class and the rest on all others alike, (B, K); mixed ones by their largest."""
    one_hot = F.one_hot(hard(y), num_classes).to(dtype)
    return one_hot * factor + (1 - one_hot) * (1 - factor) / (num_classes - 1)
