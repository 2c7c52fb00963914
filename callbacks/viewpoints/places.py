"""What viewpoint attacks found, as places on the view sphere."""

from __future__ import annotations

from ...functional.viewpoints import azimuth_and_elevation
from ...report.view_components import Component, mixture_components
from .distribution import UniformViews, ViewDistribution

_DRAWN, _MANY = 20, 30


def places_of(distribution: ViewDistribution | UniformViews) -> list[Component]:
    """The components of all objects; of a ``per_dim`` mixture, whose components are no places, 20 views of each object.

    None of uniform views, nor of a mixture of more than 30, such as a grid: they would cover the map.
    """
    if isinstance(distribution, UniformViews) or distribution.components > _MANY:
        return []
    if distribution.mixture == "joint":
        return mixture_components(distribution.weights, distribution.mean, distribution.sigma, distribution.space)
    view = distribution.to("cpu").sample(_DRAWN)[1].flatten(0, 1)
    azimuth, elevation = azimuth_and_elevation(distribution.space.to_matrix(view))
    return [Component(*place, 1 / _DRAWN) for place in zip(azimuth.tolist(), elevation.tolist(), strict=True)]
