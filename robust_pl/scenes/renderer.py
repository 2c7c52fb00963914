"""What every renderer offers: images of one scene from any number of poses at once."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Views(NamedTuple):
    """Images of a scene, without a background.

    Args:
        rgb: colours (N, 3, H, W) in [0, 1], already multiplied by alpha: over black they are the image.
        alpha: how much of a pixel the scene covers, (N, 1, H, W) in [0, 1].
    """

    rgb: Tensor
    alpha: Tensor

    def over(self, background: Tensor | float) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] in front of a background: a grey value, a colour (3, 1, 1), or images (N, 3, H, W)."""
        return (self.rgb + (1 - self.alpha) * background).clamp(0.0, 1.0)


@runtime_checkable
class Renderer(Protocol):
    """A scene that can be looked at. Any class with these members is one; none needs to inherit.

    The same poses give the same images, bit for bit, on one machine. Nothing is normalised: that belongs to the classifier.
    """

    image_size: tuple[int, int]
    """Height and width of the images, in pixels."""
    fov_x: float
    """Horizontal field of view, in degrees."""
    differentiable: bool
    """Whether gradients flow from the images to the poses."""

    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device; OpenGL cameras, pixel centres at + 0.5."""
        ...

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds the scene."""
        ...

    def fingerprint(self) -> str:
        """Sum of the scene and of what renders it, which every record of a view names."""
        ...


def focal_length(fov_x: float, width: int) -> float:
    """In pixels."""
    if not 0 < fov_x < 180:
        raise ValueError(f"fov_x={fov_x} is an angle in degrees: choose from (0, 180)")
    return 0.5 * width / float(torch.tan(torch.deg2rad(torch.tensor(fov_x, dtype=torch.float64)) / 2))


def pixel_rays(pose: Tensor, image_size: tuple[int, int], fov_x: float) -> tuple[Tensor, Tensor]:
    """Where the rays of all pixels begin, (N, 3), and unit directions, (N, H, W, 3), in the world, of poses (N, 4, 4)."""
    height, width = image_size
    focal = focal_length(fov_x, width)
    across = (torch.arange(width, dtype=pose.dtype, device=pose.device) + 0.5 - width / 2) / focal
    down = (torch.arange(height, dtype=pose.dtype, device=pose.device) + 0.5 - height / 2) / focal
    local = torch.stack(
        [
            across.expand(height, width),
            -down.unsqueeze(1).expand(height, width),
            -torch.ones_like(across).expand(height, width),
        ],
        -1,
    )
    directions = torch.einsum("nij,hwj->nhwi", pose[:, :3, :3], local)
    return pose[:, :3, 3], torch.nn.functional.normalize(directions, dim=-1)
