"""To the 256 values of a pixel, where rounding errors of the arithmetic before must not tell."""

from __future__ import annotations

from torch import Tensor

_TINY = 1e-6


def truncated(x: Tensor) -> Tensor:
    """The multiple of 1/255 at or below each value of [0, 1]; a millionth of a step above it counts as on it."""
    return (x.clamp(0, 1) * 255 + _TINY).floor() / 255


def rounded(x: Tensor) -> Tensor:
    """The nearest multiple of 1/255 in [0, 1]."""
    return (x.clamp(0, 1) * 255 + 0.5 + _TINY).floor() / 255
