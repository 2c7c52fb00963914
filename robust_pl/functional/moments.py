"""Means and standard deviations of feature maps, and their exchange."""

from __future__ import annotations

from torch import Tensor

_EPS = 1e-5


def channel_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the places of each channel, (B, C, H, W) -> (B, C, 1, 1) twice.

    The deviation is sqrt(variance + 1e-5) with the unbiased variance, as in the authors' code of AdaIN.
    """
    return z.mean((2, 3), keepdim=True), (z.var((2, 3), keepdim=True) + _EPS).sqrt()


def match_moments(content: Tensor, mean: Tensor, std: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """Adaptive instance normalisation, AdaIN (Huang and Belongie 2017, arXiv 1703.06868).

    Each channel of the content gets the mean and standard deviation given, ``std * (content - m) / s + mean``, of which
    ``alpha`` is taken and the rest of the content as it is.

    Args:
        content: (B, C, H, W).
        mean: of the style, (B, C, 1, 1).
        std: likewise.
        alpha: share in [0, 1], a number or (B, 1, 1, 1).
    """
    own_mean, own_std = channel_moments(content)
    return content + alpha * (std * (content - own_mean) / own_std + mean - content)
