"""Upright cameras that look at the origin."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.viewpoints import camera_to_world


def orbit(azimuth: Tensor, elevation: Tensor, distance: Tensor | float) -> Tensor:
    """Poses camera-to-world (..., 4, 4) of cameras at azimuth and elevation, in degrees, that see the origin in the middle.

    The inverse of :func:`robust_pl.functional.viewpoints.azimuth_and_elevation` in a :class:`ViewSpace`'s terms: gamma 0, theta
    90 degrees beyond the azimuth, phi 90 degrees minus the elevation, no shift.

    Args:
        azimuth: from x towards y, (...).
        elevation: above the horizon, (...).
        distance: from the origin, in units of the scene.
    """
    azimuth, elevation, r = torch.broadcast_tensors(azimuth, elevation, torch.as_tensor(distance, dtype=azimuth.dtype))
    still = torch.zeros_like(azimuth)
    return camera_to_world(torch.stack([still, azimuth + 90, 90 - elevation, r, still, still], -1))


def distance_to_see(radius: float, fov_x: float, image_size: tuple[int, int]) -> float:
    """From which a sphere around the origin fills nine tenths of the image, in units of the scene.

    Args:
        radius: of the sphere.
        fov_x: horizontal field of view, in degrees.
        image_size: height and width in pixels.
    """
    height, width = image_size
    half = torch.deg2rad(torch.tensor(fov_x / 2, dtype=torch.float64)).tan() * min(1.0, height / width)
    return float(radius / (0.9 * half).atan().sin())
