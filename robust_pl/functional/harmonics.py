"""Real spherical harmonics of low degree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEGREES = (0, 1, 2)


def harmonics(direction: Tensor, degree: int) -> Tensor:
    """Values (K, N), K = (degree + 1)^2, at unit directions (3, N): orthonormal over the sphere, without Condon-Shortley signs.

    Rows are 1; y, z, x; xy, yz, 3z^2 - 1, xz, x^2 - y^2, each times its constant.

    Raises:
        ValueError: if the degree is not 0, 1 or 2.
    """
    if degree not in DEGREES:
        raise ValueError(f"degree={degree} of spherical harmonics is not there: choose 0, 1 or 2")
    x, y, z = direction
    rows = [torch.full_like(x, math.sqrt(1 / (4 * math.pi)))]
    if degree > 0:
        rows += [math.sqrt(3 / (4 * math.pi)) * axis for axis in (y, z, x)]
    if degree > 1:
        mixed, along = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
        rows += [mixed * x * y, mixed * y * z, along * (3 * z * z - 1), mixed * x * z, mixed / 2 * (x * x - y * y)]
    return torch.stack(rows)
