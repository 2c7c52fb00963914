"""Geometry of cameras around an object at the origin: poses, squashing, and where a camera stands on the view sphere.

The world has z up. A camera looks along its own -z with y up and x to the right (OpenGL, as in NeRF's files); a pose is its
4 x 4 matrix camera-to-world. Angles are in degrees.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def camera_to_world(view: Tensor) -> Tensor:
    """Poses (..., 4, 4) of viewpoints (gamma, theta, phi, r, x, y), (..., 6), as ViewFool has them (arXiv 2210.03895).

    Rz(theta) Ry(-gamma) Rx(phi) T(x, y, r): from a camera at distance ``r`` above the object that looks down, moved by x and y
    in its own plane, phi tilts it down from the pole, gamma tilts that sideways and theta turns it around the object. The sign
    of gamma is that of the authors' code. The distance stays ``r``; their later code (VIAT) divides it away, see
    :func:`cancelled_distance`.
    """
    gamma, theta, phi, r, x, y = view.unbind(-1)
    about_z = _rotation(theta, (0, 1))
    about_y = _rotation(gamma, (0, 2))
    about_x = _rotation(phi, (1, 2))
    turn = about_z @ about_y @ about_x
    position = turn @ torch.stack([x, y, r], -1).unsqueeze(-1)
    pose = torch.cat([turn, position], -1)
    last = torch.zeros_like(pose[..., :1, :])
    last[..., 3] = 1.0
    return torch.cat([pose, last], -2)


def _rotation(degrees: Tensor, plane: tuple[int, int]) -> Tensor:
    """Rotations (..., 3, 3) from the first axis of a plane towards the second."""
    angle = torch.deg2rad(degrees)
    a, b = plane
    entries = torch.zeros(*degrees.shape, 3, 3, dtype=degrees.dtype, device=degrees.device)
    entries[..., range(3), range(3)] = 1.0
    entries[..., a, a] = entries[..., b, b] = angle.cos()
    entries[..., b, a], entries[..., a, b] = angle.sin(), -angle.sin()
    return entries


def cancelled_distance(distance: Tensor, scale: float) -> Tensor:
    """``scale * d / sqrt(d^2 + 1)``: the distance from the origin that VIAT's code (arXiv 2307.10235) gives a camera at d.

    It divides the camera's place by the norm of its homogeneous coordinates over 1.5, so that distances of 3 to 5 become 1.423
    to 1.471.
    """
    return scale * distance / (distance.square() + 1).sqrt()


def azimuth_and_elevation(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Degrees of where cameras stand around the origin: azimuth in [-180, 180] from x towards y, elevation in [-90, 90].

    Args:
        pose: camera-to-world (..., 4, 4).
    """
    position = F.normalize(pose[..., :3, 3], dim=-1)
    azimuth = torch.atan2(position[..., 1], position[..., 0])
    return torch.rad2deg(azimuth), torch.rad2deg(position[..., 2].clamp(-1, 1).asin())


def log_tanh_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2), exact also where tanh(u) rounds to 1."""
    return 2 * (math.log(2) - u.abs() - F.softplus(-2 * u.abs()))
