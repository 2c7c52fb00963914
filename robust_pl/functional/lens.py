"""Lens distortion of the OpenCV model: two radial and two tangential coefficients."""

from __future__ import annotations

from torch import Tensor

STEPS = 100
"""Of the fixed-point iteration at most; phone and consumer lenses need about ten."""
TOLERANCE = 1e-9


def distort(x: Tensor, y: Tensor, k1: float, k2: float, p1: float, p2: float) -> tuple[Tensor, Tensor]:
    """Where a lens shows points (x, y) of the plane at depth 1, y downwards.

    x' = x (1 + k1 r^2 + k2 r^4) + 2 p1 x y + p2 (r^2 + 2 x^2), y' = y (1 + k1 r^2 + k2 r^4) + p1 (r^2 + 2 y^2) + 2 p2 x y.
    """
    square = x * x + y * y
    radial = 1 + square * (k1 + square * k2)
    across = 2 * p1 * x * y + p2 * (square + 2 * x * x)
    down = p1 * (square + 2 * y * y) + 2 * p2 * x * y
    return x * radial + across, y * radial + down


def undistort(x: Tensor, y: Tensor, k1: float, k2: float, p1: float, p2: float) -> tuple[Tensor, Tensor]:
    """The points that :func:`distort` sends to (x, y), in float64, by fixed-point iteration: moves by what is amiss.

    Raises:
        ValueError: if it does not settle, because the coefficients fold the picture over.
    """
    target_x, target_y = x.double(), y.double()
    x, y = target_x, target_y
    for _ in range(STEPS):
        shown_x, shown_y = distort(x, y, k1, k2, p1, p2)
        amiss_x, amiss_y = target_x - shown_x, target_y - shown_y
        x, y = x + amiss_x, y + amiss_y
        if max(amiss_x.abs().max(), amiss_y.abs().max()) < TOLERANCE:
            return x, y
    raise ValueError(f"the lens k1={k1}, k2={k2}, p1={p1}, p2={p2} cannot be undone over the whole picture: check its numbers")
