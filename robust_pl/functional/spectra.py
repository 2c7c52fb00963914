"""Spectra of images: filters with a square window, amplitudes, and where the energy lies.

A frequency is (u, v), in whole cycles over the height and the width of an image, each in -n // 2 ... (n - 1) // 2; the map of
a spectrum has (0, 0) at (H // 2, W // 2). All is computed in float32, or float64 for such images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(n: int) -> Tensor:
    """Cycles over n pixels of each bin in the order of the transform, int64 (n,): 0, 1, ..., -2, -1."""
    k = torch.arange(n)
    return torch.where(k < (n + 1) // 2, k, k - n)


def window(height: int, width: int, size: int, device: torch.device | None = None) -> Tensor:
    """Weights of the centred ``size`` x ``size`` window of frequencies, float32 (H, W), in the order of the transform.

    The window covers n // 2 - size // 2 ... of the centred spectrum, ``size`` bins along each axis, as the code of frequency
    regularization has it (Huang et al. 2022, arXiv 2212.12732). An even one reaches -size / 2 and only size / 2 - 1; taking the
    real part of what it lets through then halves both bins of a pair of which it holds one, and so do these weights, which are
    symmetric.

    Raises:
        ValueError: if the window is larger than the spectrum.
    """
    if not 0 <= size <= min(height, width):
        raise ValueError(f"size={size} does not fit into a spectrum of {height} x {width}: choose 0 to {min(height, width)}")
    inside = [(f >= -(size // 2)) & (f < size - size // 2) for f in (frequencies(height), frequencies(width))]
    hard = (inside[0][:, None] & inside[1][None, :]).float()
    return ((hard + mirrored(hard)) / 2).to(device)


def mirrored(spectrum: Tensor) -> Tensor:
    """What lies at (-u, -v), for a spectrum (..., H, W) in the order of the transform."""
    return spectrum.flip(-2, -1).roll((1, 1), (-2, -1))


def low_pass(x: Tensor, size: int) -> Tensor:
    """The part of images (..., H, W) that lies in the centred window, channel by channel; it may leave [0, 1]."""
    height, width = x.shape[-2:]
    weights = window(height, width, size, x.device)[:, : width // 2 + 1]
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.fft.irfft2(torch.fft.rfft2(wide) * weights, s=(height, width))


def high_pass(x: Tensor, size: int, keep_mean: bool = True) -> Tensor:
    """The rest of :func:`low_pass`, x - low_pass(x); with ``keep_mean`` each channel keeps its mean."""
    rest = x - low_pass(x, size)
    # A window of size 0 let the mean through already.
    return rest + x.to(rest.dtype).mean((-2, -1), keepdim=True) if keep_mean and size else rest


def amplitude(x: Tensor) -> Tensor:
    """Centred |F(x)| of (..., H, W), not normalised: sum of |F|^2 = H W times the sum of squares."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.fft.fftshift(torch.fft.fft2(wide), dim=(-2, -1)).abs()


def radii(height: int, width: int) -> Tensor:
    """Distance sqrt(u^2 + v^2) of each bin of a centred spectrum from (0, 0), in cycles an image, float64 (H, W)."""
    u, v = (torch.fft.fftshift(frequencies(n)).double() for n in (height, width))
    return (u[:, None].square() + v[None, :].square()).sqrt()


def radial_sums(centred: Tensor) -> Tensor:
    """Sums of a centred map (..., H, W) over rings, (..., R): ring k holds the bins whose radius rounds to k."""
    rings = radii(*centred.shape[-2:]).round().long().flatten().to(centred.device)
    flat = centred.flatten(-2)
    empty = torch.zeros(*flat.shape[:-1], int(rings.max()) + 1, dtype=flat.dtype, device=flat.device)
    return empty.index_add(-1, rings, flat)


def radial_shares(power: Tensor) -> Tensor:
    """Share of the energy in each ring of a centred |F|^2 (..., H, W), (..., R); all 0 where there is none."""
    sums = radial_sums(power)
    return sums / sums.sum(-1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)


def window_share(power: Tensor, size: int) -> Tensor:
    """Share of the energy of a centred |F|^2 (..., H, W) that lies in the centred window, (...); 0 where there is none."""
    inside = torch.fft.fftshift(window(*power.shape[-2:], size, power.device))
    total = power.sum((-2, -1))
    return (power * inside).sum((-2, -1)) / total.clamp_min(torch.finfo(total.dtype).tiny)


def kernel_roughness(weight: Tensor) -> Tensor:
    """Differences of neighbouring taps over the sum of taps, sum |w_a - w_b| / sum |w|, of kernels (O, C, k, k), a scalar.

    0 for constant kernels, the larger the rougher. That robust networks have smoother first kernels is a claim of frequency
    regularization's paper (Huang et al. 2022, arXiv 2212.12732), made on pictures; the statistic is ours.
    """
    w = weight.detach().double()
    differences = w.diff(dim=-1).abs().sum() + w.diff(dim=-2).abs().sum()
    return differences / w.abs().sum().clamp_min(torch.finfo(w.dtype).tiny)
