"""Viewpoints as photographers choose them."""

from __future__ import annotations

from .view_space import Parameter, Range, ViewSpace

USUAL_ELEVATION: Range = (10.0, 50.0)
"""Degrees above the horizon."""


def natural_space(space: ViewSpace, elevation: Range = USUAL_ELEVATION) -> ViewSpace:
    """Upright views from all around, at the elevations, with distance and shifts of ``space``.

    The natural views of VIAT (Ruan et al. 2023, arXiv 2307.10235): tilt ``gamma`` is 0, azimuth ``theta`` all around, ``phi``
    90 degrees minus the elevation; distance and shifts move in the ranges of ``space``, as far as they are active there.

    Args:
        space: whose distance and shifts are taken.
        elevation: lowest and highest, in degrees above the horizon.

    Raises:
        ValueError: if the elevations do not rise or lie outside of [-90, 90].
    """
    low, high = elevation
    if not -90 <= low < high <= 90:
        raise ValueError(f"elevation=({low}, {high}) must rise and lie in [-90, 90] degrees, such as (10, 50)")
    moves: list[Parameter] = [name for name in ("r", "x", "y") if name in space.active]
    fixed: dict[Parameter, float] = {name: value for name, value in space.fixed.items() if name in ("r", "x", "y")}
    ranges = {name: space.ranges[name] for name in ("r", "x", "y")}
    return ViewSpace(
        phi=(90 - high, 90 - low),
        **ranges,
        active=["theta", "phi", *moves],
        fixed={**fixed, "gamma": 0.0},
        normalize_radius=space.normalize_radius,
    )
