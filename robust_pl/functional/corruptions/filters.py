"""Linear filters along both axes of images, as matrices: in float64 the sums do not depend on the device or the batch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Border = Literal["nearest", "reflect", "mirror"]
"""What lies beyond a row a b c d, as SciPy names it: nearest d d d, reflect d c b, mirror c b a."""

_LEAST_EIGENVALUE = 1e-12


def fold(place: Tensor, n: int, border: Border) -> Tensor:
    """The place in 0..n-1 that stands for one beyond the border, int64."""
    if border == "nearest":
        return place.clamp(0, n - 1)
    last = 2 * n - 1 if border == "reflect" else 2 * n - 2
    period = 2 * n if border == "reflect" else max(1, last)
    place = place % period
    return torch.minimum(place, last - place)


@lru_cache(maxsize=256)
def filter_matrix(n: int, taps: tuple[float, ...], border: Border) -> Tensor:
    """Matrix (n, n) that correlates a column of n values with an odd number of taps; float64, on the CPU."""
    radius = len(taps) // 2
    place = fold(torch.arange(n).unsqueeze(1) + torch.arange(-radius, radius + 1), n, border)
    weights = torch.tensor(taps, dtype=torch.float64).expand(n, -1)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, place, weights)


def separable(x: Tensor, down: tuple[float, ...], across: tuple[float, ...], border: Border) -> Tensor:
    """Correlate the columns of images (..., H, W) with the taps ``down``, and the rows with ``across``."""
    rows, columns = (filter_matrix(n, taps, border).to(x.device) for n, taps in zip(x.shape[-2:], (down, across), strict=True))
    return rows @ x @ columns.T


def gaussian_taps(sigma: float, radius: int) -> tuple[float, ...]:
    """A sampled Gaussian of sum 1."""
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)] if radius else [1.0]
    return tuple(weight / sum(weights) for weight in weights)


def gaussian(x: Tensor, sigma: float, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Gaussian blur of images (..., H, W), cut off at ``truncate`` standard deviations, as SciPy's."""
    radius = int(truncate * sigma + 0.5)
    if not radius:
        return x
    taps = gaussian_taps(sigma, radius)
    return separable(x, taps, taps, border)


def symmetric_filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate images (..., H, W) with a kernel (n, n) that is its own transpose; mirrored at the border.

    A kernel that equals its transpose is a sum of as many separable ones as it has eigenvalues, few for a disk.
    """
    values, vectors = torch.linalg.eigh(kernel)
    total = torch.zeros_like(x)
    for value, vector in zip(values.tolist(), vectors.T.tolist(), strict=True):
        if abs(value) > _LEAST_EIGENVALUE:
            total += value * separable(x, tuple(vector), tuple(vector), "mirror")
    return total


def mean_of_9(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels of images (..., H, W), mirrored at the border."""
    third = (1 / 3, 1 / 3, 1 / 3)
    return separable(x, third, third, "mirror")


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """The middle of images (..., H, W), enlarged linearly to the size of all of them.

    As in the benchmark the corner pixels of the part stay the corners of its enlarged image, which is then cut to size.
    """
    for axis in (-2, -1):
        n = x.shape[axis]
        part = math.ceil(n / factor)
        large = max(round(part * factor), n)
        place = torch.arange(large, dtype=torch.float64, device=x.device) * ((part - 1) / max(1, large - 1))
        place = place[(large - n) // 2 :][:n]
        low = place.long()
        share = (place - low).view(-1, *[1] * (-1 - axis))
        first = (n - part) // 2
        lower, upper = (x.index_select(axis, first + one.clamp(max=part - 1)) for one in (low, low + 1))
        x = lower + (upper - lower) * share
    return x
