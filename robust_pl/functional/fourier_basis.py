"""The real Fourier basis of images, for sensitivity to one frequency at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .spectra import frequencies


def directions(height: int, width: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The different directions among the central ``rows`` x ``columns`` frequencies, since (u, v) and (-u, -v) are one.

    Returns:
        Bins (u, v) modulo (H, W) of each of the D directions, int64 (D, 2), and for each place of the centred map which
        direction it is, int64 (rows, columns). 31 x 31 places of 32 x 32 are 481 directions, all 32 x 32 are 514.
    """
    u, v = (
        torch.fft.fftshift(frequencies(n))[n // 2 - r // 2 : n // 2 - r // 2 + r] for n, r in ((height, rows), (width, columns))
    )
    u, v = u[:, None].expand(rows, columns), v[None, :].expand(rows, columns)
    key = torch.minimum(u % height * width + v % width, -u % height * width + -v % width)
    chosen, which = key.unique(return_inverse=True)
    return torch.stack([chosen // width, chosen % width], 1), which


def fourier_basis(bins: Tensor, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Waves of unit l2 norm whose transform is not 0 at (u, v) and (-u, -v) alone, float32 (D, H, W).

    They are cosines, the real parts of a spectrum with ones in the two bins, as Yin et al. 2019 (arXiv 1906.08988) have them.

    Args:
        bins: (u, v) modulo (H, W), int64 (D, 2).
        height: H.
        width: W.
        device: of the result.
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)[None, :]
    u, v = bins[:, 0, None, None], bins[:, 1, None, None]
    # Whole turns are taken off in integers, so that the phase is exact.
    turns = (u * row % height).double() / height + (v * column % width).double() / width
    waves = (2 * torch.pi * turns).cos()
    return (waves / waves.square().sum((1, 2), keepdim=True).sqrt()).float().to(device)
