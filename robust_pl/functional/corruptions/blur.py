"""Blur: defocus, glass, motion, zoom, and gaussian. Pixels float64 (B, 3, H, W), multiples of 1/255."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .draws import Draws
from .filters import clipped_zoom, gaussian, gaussian_taps, separable, symmetric_filter
from .motion import streaked
from .rounding import rounded, truncated

_DOUBLINGS = 6


def gaussian_blur(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Gaussian blur, cut off at four standard deviations; the border is repeated."""
    return gaussian(x, sigma)


def defocus_blur(x: Tensor, draws: Draws, radius: float, edge: float) -> Tensor:
    """What a lens that is not in focus makes of points: disks with a soft edge. Mirrored at the border."""
    return symmetric_filter(x, disk(radius, edge))


def disk(radius: float, edge: float) -> Tensor:
    """The kernel (n, n) of a disk with a softened edge, on the CPU.

    Its sum is 1, but for radii of 8 and 10, where the disk touches the kernel's border: there the sum is 1.013 and 1.011, as
    in the benchmark, which mirrors the kernel at its border where its edge is blurred.
    """
    reach = 8 if radius <= 8 else int(radius)
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (place.square() + place.square().unsqueeze(1) <= radius**2).double()
    taps = gaussian_taps(edge, 1 if radius <= 8 else 2)
    soft = separable(inside / inside.sum(), taps, taps, "mirror")
    empty = int((soft.sum(0) != 0).nonzero()[0])
    return soft[empty : len(soft) - empty, empty : len(soft) - empty]


def glass_blur(x: Tensor, draws: Draws, sigma: float, delta: float, iterations: float) -> Tensor:
    """Frosted glass: pixels are replaced by others near them, between two Gaussian blurs.

    The benchmark meant to exchange pixels with neighbours, one after the other, but its code writes the neighbour over the
    pixel and leaves the neighbour as it is. Its images were made so, and so are these, exactly: see :func:`scattered`.
    """
    x = truncated(gaussian(x, sigma))
    for _ in range(int(iterations)):
        x = scattered(x, draws.integers(-int(delta), int(delta), 2, *x.shape[-2:]), int(delta))
    return gaussian(x, sigma)


def scattered(x: Tensor, way: Tensor, delta: int) -> Tensor:
    """Replace one pixel after the other by the neighbour that ``way`` says, from the last row and column to the first.

    A neighbour that was replaced before gives its new value. So each pixel ends with the value at the end of a chain of
    neighbours; chains are followed for all pixels at once, each time twice as far (64 neighbours in the end; of the chains that
    are longer there is one in 10^24). Nothing is replaced in the first rows and columns up to ``delta``, and in the last
    delta - 1.

    Args:
        x: images (B, C, H, W).
        way: columns and rows to the neighbour, int64 (B, 2, H, W) in [-delta, delta).
        delta: largest of them.
    """
    c, h, w = x.shape[1:]
    place = torch.arange(h * w, device=x.device)
    row, column = place // w, place % w
    replaced = (row > delta) & (row <= h - delta) & (column > delta) & (column <= w - delta)
    neighbour = torch.where(replaced, place + way[:, 1].flatten(1) * w + way[:, 0].flatten(1), place)
    goes_on = (neighbour > place) & replaced[neighbour]
    # The end of a chain is told from its links by a number that is larger by the number of pixels.
    follows = torch.where(goes_on, neighbour, neighbour + h * w)
    for _ in range(_DOUBLINGS):
        follows = torch.where(follows < h * w, follows.gather(1, follows % (h * w)), follows)
    source = (follows % (h * w)).unsqueeze(1).expand(-1, c, -1)
    return x.flatten(2).gather(2, source).view_as(x)


def motion_blur(x: Tensor, draws: Draws, radius: float, sigma: float) -> Tensor:
    """A streak within 45 degrees of level. Reconstructed: not the same as ImageMagick's, file by file."""
    angle = 90 * draws.uniform() - 45
    return rounded(streaked(x, angle, radius, sigma))


def zoom_blur(x: Tensor, draws: Draws, end: float, step: float) -> Tensor:
    """The mean of the image and of its enlargements by factors 1, 1 + step, ..."""
    factors = np.arange(1, end, step).tolist()  # in some cases the end is one of them
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)
