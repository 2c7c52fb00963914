"""Labels that are smoothed at random."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .losses import hard

_TINY = 1e-12


def randomly_smoothed(y: Tensor, noise: Tensor, smoothing: float) -> Tensor:
    """1 - smoothing on the right class, and the rest on the others in proportion to ``noise`` (Pan et al., ICCV 2025), (B, K).

    Args:
        y: labels (B,), or (B, K), of which the largest entry counts.
        noise: numbers from U[0, 1), (B, K); that of the right class means nothing.
        smoothing: in [0, 1].
    """
    one_hot = F.one_hot(hard(y), noise.shape[1]).to(noise.dtype)
    others = (noise + _TINY) * (1 - one_hot)  # of noise that is all zero the others get equal parts
    return (1 - smoothing) * one_hot + smoothing * others / others.sum(1, keepdim=True)
