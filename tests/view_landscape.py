"""A toy for viewpoint attacks: a renderer whose images are the camera's pose, and a classifier that fails near known poses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import SceneSet, Views

POSITION = 16.0


class PosePhoto:
    """Writes the twelve numbers of a pose into the pixels of a 2 x 2 image."""

    fov_x, differentiable, radius, image_size = 40.0, False, 1.0, (2, 2)

    def __init__(self, name: str = "photo", radius: float = 1.0) -> None:
        self.name, self.radius = name, radius
        self.calls: list[int] = []

    def render(self, pose: Tensor) -> Views:
        self.calls.append(len(pose))
        turn = pose[:, :3, :3] / 2 + 0.5
        position = pose[:, :3, 3:] / POSITION + 0.5
        rgb = torch.cat([turn, position], 2).view(-1, 3, 2, 2)
        return Views(rgb, torch.ones_like(rgb[:, :1]))

    def fingerprint(self) -> str:
        return self.name


class FailsNear(nn.Module):
    """Says class 0 everywhere but near some viewpoints (M, 6), and the nearer the surer class 1.

    Args:
        views: where.
        width: of the regions, in units of the pose matrix, positions scaled as the images have them.
        classes: number of logits; those beyond two never win.
    """

    def __init__(self, views: Tensor, width: float = 0.35, classes: int = 3) -> None:
        super().__init__()
        pose = camera_to_world(views)
        self.register_buffer("bad", torch.cat([pose[:, :3, :3] / 2, pose[:, :3, 3:] / POSITION], 2).flatten(1) + 0.5)
        self.sharp = nn.Parameter(torch.tensor(1 / width**2))
        self.num_classes = classes

    def forward(self, x: Tensor) -> Tensor:
        # Sums of twelve numbers, the same in any batch.
        away = (x.flatten(1).unsqueeze(1) - self.bad).square().sum(-1).amin(1) * self.sharp
        margin = 8 * (-away).exp() - 4
        rest = torch.full((len(x), self.num_classes - 2), -20.0)
        return torch.cat([-margin.unsqueeze(1), torch.zeros(len(x), 1), rest], 1)


def photos(count: int, radius: float = 1.0) -> SceneSet:
    """Objects of class 0 that all look alike."""
    return SceneSet([PosePhoto(f"photo {i}", radius) for i in range(count)], [0] * count, [f"thing/{i}" for i in range(count)])
