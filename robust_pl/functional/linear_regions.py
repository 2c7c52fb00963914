"""Units of a network that change sign in a small neighbourhood, local complexity (Humayun et al. 2024, arXiv 2402.15555)."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_polytope(dimension: int, pairs: int, seed: int) -> Tensor:
    """Orthonormal directions of a cross-polytope, float32 (pairs, dimension): a function of the seed.

    They are the orthogonal factor of a Gaussian matrix, drawn on the CPU by a generator of its own; the signs, which the
    factorisation leaves open, do not matter to x + v and x - v.

    Raises:
        ValueError: if there are more directions than dimensions.
    """
    if not 1 <= pairs <= dimension:
        raise ValueError(f"{pairs} orthogonal directions do not fit into {dimension} dimensions: choose at most {dimension}")
    gaussian = torch.randn(dimension, pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T.float().contiguous()


def polytope_vertices(x: Tensor, frame: Tensor, radius: float) -> Tensor:
    """The points x + r v and x - r v of images (M, C, H, W) and directions (P, C * H * W), float32 (M, 2 P, C, H, W)."""
    steps = radius * torch.cat([frame, -frame]).view(-1, *x.shape[1:])
    return x.float().unsqueeze(1) + steps


def crossed_units(preactivations: Tensor, points: int) -> Tensor:
    """How many units of a layer do not have one sign at all points around each of M samples, int64 (M,).

    Exact for a first layer, whose hyperplanes cross a polytope where its vertices lie on both sides. Further inside only the
    vertices are looked at and not what the layers before made of the polytope. A unit at 0 has a sign of its own.

    Args:
        preactivations: (M * points, ...), the points of a sample one after the other; for a convolution every position is a
            unit.
        points: a sample.
    """
    signs = preactivations.sign().view(-1, points, preactivations[0].numel())
    return (signs != signs[:, :1]).any(1).sum(1)
