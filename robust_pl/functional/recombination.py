"""Images put together from the amplitude spectrum of one and the phase spectrum of another."""

from __future__ import annotations

import torch
from torch import Tensor


def recombined(amplitude: Tensor, phase: Tensor) -> Tensor:
    """The image with the amplitudes of one and the phases of another (Chen et al. 2021, arXiv 2108.08487).

    The Fourier transform runs over channels, rows and columns together, as in the authors' code; that of each channel alone
    gives other images. Where a coefficient of the second is zero its phase is 0. The result may leave [0, 1]. Computed in
    float32, or float64 for such images.

    Args:
        amplitude: images (B, C, H, W) whose amplitudes are taken.
        phase: images (B, C, H, W) whose phases are taken.
    """
    of, to = (torch.fft.rfftn(x if x.dtype == torch.float64 else x.float(), dim=(1, 2, 3)) for x in (amplitude, phase))
    return torch.fft.irfftn(torch.polar(of.abs(), to.angle()), s=phase.shape[1:], dim=(1, 2, 3)).to(phase.dtype)
