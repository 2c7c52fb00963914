"""Where on the view sphere the components of a mixture of viewpoints lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.viewpoints import azimuth_and_elevation
from ..scenes.view_space import ViewSpace

_POINTS = 73


@dataclass(frozen=True)
class Component:
    """A place on the view sphere, in degrees.

    Args:
        azimuth: in [-180, 180].
        elevation: in [-90, 90].
        weight: its share, in [0, 1].
        outline: azimuth and elevation of a closed curve around it, (P, 2); None for none.
    """

    azimuth: float
    elevation: float
    weight: float
    outline: np.ndarray | None = None


def mixture_components(weights: Tensor, mean: Tensor, sigma: Tensor, space: ViewSpace, samples: int = 512) -> list[Component]:
    """The components of Gaussian mixtures over unbounded numbers u, as places with one-sigma ellipses.

    A component's ``samples`` draws go through the squashing and the camera's pose to directions on the sphere. The ellipse is
    that of their covariance in the plane that touches the sphere at the component's mean, bent back onto the sphere: it holds
    39 % of a narrow Gaussian, and also shows what tilt and shift add to the angles. The draws are the same for every component.

    Args:
        weights: (..., K), of which each row is one mixture.
        mean: of u, (..., K, D).
        sigma: standard deviations of u, (..., K, D).
        space: what u means.
        samples: draws for each component.
    """
    weights, mean, sigma = weights.flatten().cpu(), mean.flatten(0, -2).double().cpu(), sigma.flatten(0, -2).double().cpu()
    noise = torch.randn(samples, space.dim, generator=torch.Generator().manual_seed(0), dtype=mean.dtype)
    middle = _direction(mean, space)
    around = _direction(mean.unsqueeze(1) + sigma.unsqueeze(1) * noise, space)
    curve = _ellipse(middle, around)
    azimuth, elevation = _angles(middle)
    outlines = torch.stack(_angles(curve), -1).numpy()
    places = zip(azimuth.tolist(), elevation.tolist(), weights.tolist(), outlines, strict=True)
    return [Component(*place) for place in places]


def _direction(u: Tensor, space: ViewSpace) -> Tensor:
    """Unit vectors (..., 3) towards the camera."""
    return F.normalize(space.to_matrix(space.squash(u))[..., :3, 3], dim=-1)


def _angles(direction: Tensor) -> tuple[Tensor, Tensor]:
    pose = torch.zeros(*direction.shape[:-1], 4, 4, dtype=direction.dtype)
    pose[..., :3, 3] = direction
    return azimuth_and_elevation(pose)


def _ellipse(middle: Tensor, around: Tensor) -> Tensor:
    """One-sigma curves (N, P, 3) on the sphere of points (N, S, 3) around middles (N, 3)."""
    up = torch.tensor([0.0, 0.0, 1.0], dtype=middle.dtype).expand_as(middle)
    aside = torch.tensor([1.0, 0.0, 0.0], dtype=middle.dtype).expand_as(middle)
    # At a pole no direction is east: any will do.
    east = torch.linalg.cross(torch.where(middle[:, 2:].abs() > 0.999, aside, up), middle)
    east = F.normalize(east, dim=-1)
    plane = torch.stack([east, torch.linalg.cross(middle, east)], 1)  # (N, 2, 3)
    flat = around @ plane.mT
    angle = torch.atan2(flat.norm(dim=2), (around @ middle.unsqueeze(2)).squeeze(2))
    flat = F.normalize(flat, dim=2) * angle.unsqueeze(2)
    center = flat.mean(1, keepdim=True)
    spread, axes = torch.linalg.eigh((flat - center).mT @ (flat - center) / flat.shape[1])
    turn = torch.linspace(0, 2 * torch.pi, _POINTS, dtype=middle.dtype)
    circle = torch.stack([turn.cos(), turn.sin()], 1)
    rim = center + circle * spread.clamp_min(0).sqrt().unsqueeze(1) @ axes.mT
    reach = rim.norm(dim=2, keepdim=True)
    return reach.cos() * middle.unsqueeze(1) + reach.sin() * (F.normalize(rim, dim=2) @ plane)
