"""Cameras of photos: intrinsics, lens, and the rays of all pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.lens import undistort


@dataclass(frozen=True)
class Camera:
    """A pinhole with a lens, in pixels; the upper left corner of the picture is (0, 0), the first pixel's centre (0.5, 0.5).

    Args:
        width: of the picture.
        height: of the picture.
        fx: focal length across.
        fy: focal length down.
        cx: where the optical axis meets the picture.
        cy: where the optical axis meets the picture.
        k1: radial distortion, see :mod:`robust_pl.functional.lens`.
        k2: radial distortion.
        p1: tangential distortion.
        p2: tangential distortion.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def __post_init__(self) -> None:
        if not (self.fx > 0 and self.fy > 0):
            raise ValueError(f"focal lengths ({self.fx}, {self.fy}) must lie above 0")

    @property
    def fov_x(self) -> float:
        """Horizontal field of view in degrees."""
        return math.degrees(math.atan(self.cx / self.fx) + math.atan((self.width - self.cx) / self.fx))

    def resized(self, width: int, height: int) -> Camera:
        """The same camera with more or fewer pixels."""
        across, down = width / self.width, height / self.height
        scaled = {"fx": self.fx * across, "cx": self.cx * across, "fy": self.fy * down, "cy": self.cy * down}
        return replace(self, width=width, height=height, **scaled)

    def directions(self) -> Tensor:
        """Unit vectors (H, W, 3) through the pixels' centres in the camera, which looks along -z with y up; float64."""
        across = ((torch.arange(self.width, dtype=torch.float64) + 0.5 - self.cx) / self.fx).expand(self.height, self.width)
        down = ((torch.arange(self.height, dtype=torch.float64) + 0.5 - self.cy) / self.fy).unsqueeze(1).expand_as(across)
        lens = (self.k1, self.k2, self.p1, self.p2)
        if any(lens):
            across, down = undistort(across, down, *lens)
        rays = torch.stack([across, -down, -torch.ones_like(across)], -1)
        return torch.nn.functional.normalize(rays, dim=-1)


class Photo(NamedTuple):
    """A picture on disk, and where it was taken."""

    file: Path
    pose: Tensor  # camera-to-world (4, 4), float64, OpenGL axes
    camera: Camera | None  # None if only the picture knows its size: see `angle`
    angle: float = 0.0  # horizontal field of view in radians, where there is no camera

    def camera_of(self, width: int, height: int) -> Camera:
        """The camera of the picture, which has this size.

        Raises:
            ValueError: if it was calibrated for another size.
        """
        if self.camera is None:
            focal = 0.5 * width / math.tan(self.angle / 2)
            return Camera(width, height, focal, focal, width / 2, height / 2)
        if (self.camera.width, self.camera.height) != (width, height):
            raise ValueError(
                f"{self.file} is {width} x {height} pixels, and its camera was calibrated for {self.camera.width} x "
                f"{self.camera.height}: give the pictures that belong to the poses"
            )
        return self.camera


def camera_from(numbers: Mapping[str, Any], names: tuple[str, ...] = ("w", "h", "fl_x", "fl_y", "cx", "cy")) -> Camera:
    """Of a map with these names and, if it has them, k1, k2, p1, p2; the focal length down is by default that across."""
    width, height, fx = (numbers[name] for name in names[:3])
    fy, cx, cy = (numbers.get(name, default) for name, default in zip(names[3:], (fx, width / 2, height / 2), strict=True))
    lens = {name: float(numbers.get(name, 0.0)) for name in ("k1", "k2", "p1", "p2")}
    return Camera(int(width), int(height), float(fx), float(fy), float(cx), float(cy), **lens)
