"""Weather: snow, frost, and fog. Pixels float64 (B, 3, H, W), multiples of 1/255; results may leave [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import Draws
from .filters import clipped_zoom
from .ice import ice_textures
from .motion import streaked
from .rounding import rounded, truncated

_GREY = (0.299, 0.587, 0.114)
_SMALL = 96


def snow(
    x: Tensor,
    draws: Draws,
    mean: float,
    deviation: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    share: float,
) -> Tensor:
    """Flakes from noise above a threshold, enlarged and streaked by the wind, twice, over a paler image.

    Reconstructed: the streaks are not the same as ImageMagick's, file by file.
    """
    flakes = clipped_zoom(mean + deviation * draws.normal(1, *x.shape[-2:]), size)
    flakes = truncated(torch.where(flakes < threshold, 0.0, flakes))
    flakes = rounded(streaked(flakes, 90 * draws.uniform() - 135, radius, sigma))
    grey = (x * x.new_tensor(_GREY).view(3, 1, 1)).sum(1, keepdim=True)
    paler = share * x + (1 - share) * torch.maximum(x, grey * 1.5 + 0.5)
    return paler + flakes + flakes.flip(-2, -1)


def frost(x: Tensor, draws: Draws, image: float, ice: float) -> Tensor:
    """Ice crystals over the image: ``image`` * x + ``ice`` * a random part of one of five textures.

    The benchmark cuts from five photographs, which may not be passed on; these textures are procedural, see
    :func:`robust_pl.functional.corruptions.ice.ice_textures`, so that results are comparable with each other, and not with the
    benchmark's.
    """
    height, width = x.shape[-2:]
    textures = ice_textures(min(height, width) < _SMALL).to(x.device)
    count, size = textures.shape[0], textures.shape[-1]
    which = draws.integers(0, count)
    top, left = draws.integers(0, size, 2).unbind(1)  # textures continue at their border
    rows = (top.unsqueeze(1) + torch.arange(height, device=x.device)) % size
    columns = (left.unsqueeze(1) + torch.arange(width, device=x.device)) % size
    cut = textures.permute(0, 2, 3, 1)[which.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
    return image * x + ice * cut.permute(0, 3, 1, 2)


def fog(x: Tensor, draws: Draws, density: float, decay: float) -> Tensor:
    """A plasma fractal added to the image, which is then as bright as it was."""
    height, width = x.shape[-2:]
    haze = plasma(draws, 1 << (max(height, width) - 1).bit_length(), decay)[:, None, :height, :width]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + density * haze) * brightest / (brightest + density)


def plasma(draws: Draws, size: int, decay: float) -> Tensor:
    """A periodic landscape by the diamond-square algorithm (Fournier et al. 1982), in [0, 1]: (B, size, size).

    Args:
        draws: random numbers, size x size of each sample.
        size: a power of two.
        decay: by which the roughness falls from one scale to the next half as large. It enters squared: the benchmark takes
            it once for the width of the distribution, and once more for the factor.
    """
    noise = 2 * draws.uniform(size, size) - 1
    land, step, roughness = torch.zeros_like(noise), size, 100.0
    while step >= 2:
        half = step // 2
        corner = land[:, ::step, ::step]
        centre = _between(corner, corner.roll(-1, 1), corner.roll(-1, 2), corner.roll((-1, -1), (1, 2)))
        centre = centre + roughness**2 * noise[:, half::step, half::step]
        above = _between(corner, corner.roll(-1, 2), centre, centre.roll(1, 1))
        beside = _between(corner, corner.roll(-1, 1), centre, centre.roll(1, 2))
        land[:, half::step, half::step] = centre
        land[:, ::step, half::step] = above + roughness**2 * noise[:, ::step, half::step]
        land[:, half::step, ::step] = beside + roughness**2 * noise[:, half::step, ::step]
        step, roughness = half, roughness / decay
    land = land - land.amin((1, 2), keepdim=True)
    return land / land.amax((1, 2), keepdim=True)


def _between(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return (a + b + c + d) / 4
