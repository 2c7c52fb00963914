"""Noise in octave-wide bands of frequency, and the channel that a network's thresholds against it describe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
MOST_BANDS = 7
GREY = (0.299, 0.587, 0.114)


def band_count(height: int, width: int) -> int:
    """How many octave bands an image has: one a halving down to 2 pixels, 7 at most, which 224 pixels have in the paper."""
    return min(MOST_BANDS, int(math.log2(min(height, width))))


def band_centres(height: int, width: int, bands: int) -> list[float]:
    """Centres of the bands in cycles over the shorter side, by octaves up to Nyquist's: 1.75, 3.5, ..., 112 for 224 pixels.

    They are the paper's (arXiv 2309.13190). White noise cut into these bands has its mean frequency at about half of them: 4.6,
    7.8, 14.3 and 29.8 cycles for 7, 14, 28 and 56.
    """
    nyquist = min(height, width) / 2
    return [nyquist / 2 ** (bands - 1 - f) for f in range(bands)]


def octave_bands(images: Tensor, bands: int) -> Tensor:
    """Levels of a Laplacian pyramid (Burt and Adelson 1983), each brought back to full size; they sum to the images.

    The filter is the binomial one of 5 taps, edges are reflected, as in the toolbox that critical-band masking's code calls
    (Subramanian et al. 2023, arXiv 2309.13190).

    Args:
        images: (B, C, H, W).
        bands: how many; the last holds what is left.

    Returns:
        (bands, B, C, H, W), from the lowest frequencies to the highest.

    Raises:
        ValueError: if the images are too small for so many bands.
    """
    least = 2 ** (bands - 1)
    if bands < 1 or min(images.shape[-2:]) < 2 * least:
        height, width = images.shape[-2:]
        raise ValueError(f"bands={bands} need images of {2 * least} x {2 * least} or more, not {height} x {width}")
    found, rest, sizes = [], images, []
    for _ in range(bands - 1):
        coarse = _blur(rest)[..., ::2, ::2]
        sizes.append(rest.shape[-2:])
        found.append(_enlarged(rest - _expand(coarse, rest.shape[-2:]), sizes[:-1]))
        rest = coarse
    return torch.stack([*found, _enlarged(rest, sizes)]).flip(0)


def _enlarged(level: Tensor, sizes: list[torch.Size]) -> Tensor:
    for size in reversed(sizes):
        level = _expand(level, size)
    return level


def _blur(images: Tensor) -> Tensor:
    channels = images.shape[1]
    taps = torch.tensor(BINOMIAL, dtype=images.dtype, device=images.device)
    kernel = torch.outer(taps, taps).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def _expand(images: Tensor, size: torch.Size) -> Tensor:
    spread = images.new_zeros(*images.shape[:2], *size)
    spread[..., ::2, ::2] = images
    return 4 * _blur(spread)


def band_noise(noise: Tensor, bands: int) -> Tensor:
    """Noise (B, 1, H, W) in one band each, (bands, B, 1, H, W); all have the root mean square of the highest band.

    So the energy of a band is not that of the noise it was cut from, as in the paper's code (arXiv 2309.13190).
    """
    levels = octave_bands(noise, bands)
    rms = levels.square().mean((2, 3, 4), keepdim=True).sqrt()
    return levels * (rms[-1:] / rms.clamp_min(torch.finfo(levels.dtype).tiny))


def low_contrast_grey(x: Tensor, contrast: float, mean: float) -> Tensor:
    """Grey images of a mean and low contrast: (grey - its mean) * contrast + mean, (B, 1, H, W), from 1 or 3 channels."""
    grey = x.float()
    if x.shape[1] == 3:
        grey = (grey * torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif x.shape[1] != 1:
        raise ValueError(f"images of {x.shape[1]} channels have no grey version: use images of 1 or 3 channels")
    return (grey - grey.mean((1, 2, 3), keepdim=True)) * contrast + mean


def add_inside(image: Tensor, noise: Tensor, margin: float) -> Tensor:
    """Sum of image and noise; where it leaves [0, 1], the image moves so that the sum is ``margin`` inside.

    Where no image in [0, 1] could do that, the sum is clamped.
    """
    total = image + noise
    low = torch.where(margin - noise <= 1, margin, 0.0)
    high = torch.where(1 - margin - noise >= 0, 1 - margin, 1.0)
    return torch.where(total < 0, low, torch.where(total > 1, high, total))


def thresholds(accuracy: Tensor, criterion: float) -> Tensor:
    """How many levels of noise fail in each band, counted from the strongest until one passes, int64 (bands,).

    Args:
        accuracy: (levels, bands), the noise rising with the level.
        criterion: a level passes above this accuracy.
    """
    return (accuracy <= criterion).flip(0).long().cumprod(0).sum(0)


@dataclass(frozen=True)
class Channel:
    """The Gaussian that describes a network's sensitivity to noise by band.

    Args:
        amplitude: peak, in levels of noise.
        centre: mu, in octaves above the lowest band's centre.
        width: sigma, in octaves.
        levels: number of noise levels.
    """

    amplitude: float
    centre: float
    width: float
    levels: int

    @property
    def bandwidth(self) -> float:
        """Full width at half of the maximum, in octaves: 2 sqrt(ln 4) sigma."""
        return 2 * math.sqrt(math.log(4)) * self.width

    @property
    def peak_sensitivity(self) -> float:
        """2^(amplitude - levels): 1 where the weakest noise fails, half for each doubling that the network stands."""
        return 2 ** (self.amplitude - self.levels)

    def at(self, band: float) -> float:
        """The Gaussian at a band, which need not be a whole number."""
        return self.amplitude * math.exp(-((band - self.centre) ** 2) / (2 * self.width**2))


def fit_channel(counts: Tensor, levels: int) -> Channel | None:
    """Least-squares Gaussian through the thresholds (bands,) of ``levels`` levels of noise.

    None where they say nothing: fewer than 3 bands, all alike, or no fit. The fit begins at the paper's start (1, 0, 1) and at
    the highest threshold, and the better one counts, since from afar a narrow peak may not be found.
    """
    import numpy as np
    from scipy.optimize import curve_fit

    t = counts.double().cpu().numpy()
    if len(t) < 3 or (t == t[0]).all():
        return None
    bands = np.arange(len(t), dtype=float)

    def gaussian(b: np.ndarray, amplitude: float, centre: float, width: float) -> np.ndarray:
        return amplitude * np.exp(-((b - centre) ** 2) / (2 * width**2))

    best: tuple[float, np.ndarray] | None = None
    for start in ((1.0, 0.0, 1.0), (float(t.max()), float(t.argmax()), 1.0)):
        try:
            bounds = ([0, -np.inf, 1e-3], [levels, np.inf, np.inf])
            found, _ = curve_fit(gaussian, bands, t, p0=start, bounds=bounds, maxfev=10_000)
        except RuntimeError:
            continue
        error = float(((gaussian(bands, *found) - t) ** 2).sum())
        if best is None or error < best[0]:
            best = error, found
    return None if best is None else Channel(*map(float, best[1]), levels)
