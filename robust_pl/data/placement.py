"""Move the world of a scene so that its object lies at the origin, with z up."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Axis = Literal["x", "y", "z", "-x", "-y", "-z"]
DISTANCE = 4.0
"""Mean distance of the cameras where they tell the scale."""


def place(
    pose: Tensor,
    center: Literal["cameras"] | tuple[float, float, float],
    scale: Literal["cameras"] | float,
    up: Axis | Literal["cameras"],
) -> Tensor:
    """Poses (N, 4, 4) camera-to-world in a world that is turned, moved and scaled; see :class:`PosedPhotosDataModule`.

    Raises:
        ValueError: if the cameras do not tell: they all stand in one point, or look along parallel lines.
    """
    pose = pose.clone()
    middle = _nearest_to_axes(pose) if center == "cameras" else pose.new_tensor(center)
    pose[:, :3, 3] -= middle
    turn = _upright(pose, up)
    pose[:, :3] = turn @ pose[:, :3]
    if scale == "cameras":
        distance = pose[:, :3, 3].norm(dim=1).mean()
        if distance < 1e-9:
            raise ValueError("the cameras stand at the center and tell no scale: give center or scale as numbers")
        scale = DISTANCE / float(distance)
    pose[:, :3, 3] *= scale
    return pose


def _nearest_to_axes(pose: Tensor) -> Tensor:
    """The point (3,) of the smallest sum of squared distances from the optical axes: sum_i (I - d_i d_i') (p - o_i) = 0."""
    axis, origin = F.normalize(pose[:, :3, 2], dim=1), pose[:, :3, 3]
    across = torch.eye(3, dtype=pose.dtype) - axis.unsqueeze(2) * axis.unsqueeze(1)
    total = across.sum(0)
    if torch.linalg.cond(total) > 1e6:
        raise ValueError("the cameras look along parallel lines and tell no center: give center as three numbers")
    return torch.linalg.solve(total, (across @ origin.unsqueeze(2)).sum(0)).squeeze(1)


def _upright(pose: Tensor, up: Axis | Literal["cameras"]) -> Tensor:
    """The smallest rotation (3, 3) that sends up to z."""
    if up == "cameras":
        towards = F.normalize(pose[:, :3, 1].mean(0), dim=0)
    else:
        towards = torch.eye(3, dtype=pose.dtype)["xyz".index(up[-1])] * (-1 if up[0] == "-" else 1)
    z = pose.new_tensor([0.0, 0.0, 1.0])
    cosine = towards @ z
    if cosine < -1 + 1e-9:  # any half turn about a level axis
        return torch.diag(pose.new_tensor([1.0, -1.0, -1.0]))
    x, y, w = torch.linalg.cross(towards, z).tolist()
    cross = pose.new_tensor([[0, -w, y], [w, 0, -x], [-y, x, 0]])
    return torch.eye(3, dtype=pose.dtype) + cross + cross @ cross / (1 + cosine)
