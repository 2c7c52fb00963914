"""What transfer attacks do to images before the network, and to gradients behind it. None of it loops over samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_side(side: int, resize_rate: float) -> int:
    """Side of the canvas in which :func:`diverse` moves an image: at least one pixel more than the image's."""
    return max(side + 1, int(side * resize_rate))


def diverse(x: Tensor, numbers: Tensor, resize_rate: float, prob: float) -> Tensor:
    """Enlarge each image at random, pad it with zeros, and scale it back (Xie et al. 2019, arXiv 1803.06978).

    With probability ``prob`` an image of side H is resized to a random side in [H, P), P = :func:`padded_side`, placed at a
    random position of a black canvas of side P, and resized to H. Both resizes are bilinear. They are linear and act on rows
    and columns apart, so each image is multiplied by one matrix from either side.

    Args:
        x: images (B, C, H, W).
        numbers: from U[0, 1), (B, 4): whether to, the side, and the position.
        resize_rate: side of the canvas over that of the image, above 1.
        prob: in [0, 1].
    """
    chosen, share, top, left = numbers.unbind(1)
    rows, columns = (
        _resize_pad_resize(side, padded_side(side, resize_rate), share, place).to(x.dtype)
        for side, place in ((x.shape[2], top), (x.shape[3], left))
    )
    moved = rows.unsqueeze(1) @ x @ columns.transpose(1, 2).unsqueeze(1)
    return torch.where((chosen < prob).view(-1, 1, 1, 1), moved, x)


def _resize_pad_resize(side: int, canvas: int, share: Tensor, place: Tensor) -> Tensor:
    """The matrices (B, side, side) that do it along one axis."""
    enlarged = side + (share * (canvas - side)).floor()
    before = (place * (canvas - enlarged + 1)).floor()
    at = torch.arange(canvas, device=share.device, dtype=share.dtype) - before.unsqueeze(1)
    inside = (at >= 0) & (at < enlarged.unsqueeze(1))
    enlarge = _interpolate((at + 0.5) * (side / enlarged).unsqueeze(1) - 0.5, side) * inside.unsqueeze(2)
    back = torch.arange(side, device=share.device, dtype=share.dtype)
    return _interpolate((back + 0.5) * (canvas / side) - 0.5, canvas) @ enlarge


def _interpolate(at: Tensor, count: int) -> Tensor:
    """Weights (..., count) of linear interpolation at the positions ``at`` (...), continued flat beyond the ends."""
    grid = torch.arange(count, device=at.device, dtype=at.dtype)
    return (1 - (at.clamp(0, count - 1).unsqueeze(-1) - grid).abs()).clamp_min(0)


def scale_copies(x: Tensor, copies: int) -> Tensor:
    """The batch so many times over, each time half as bright: x, x/2, x/4, ..., (copies * B, C, H, W) (arXiv 1908.06281)."""
    return torch.cat([x / 2**i for i in range(copies)])


def gaussian(size: int) -> Tensor:
    """Gaussian weights (size,), float64, at ``linspace(-3, 3, size)`` standard deviations; they sum to one."""
    weights = torch.exp(-torch.linspace(-3, 3, size, dtype=torch.float64).square() / 2)
    return weights / weights.sum()


def smooth(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of (B, C, H, W) with the outer product of ``kernel`` (K,) with itself; zeros lie outside."""
    kernel = kernel.to(gradient)
    flat = gradient.flatten(0, 1).unsqueeze(1)
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding="same")
    return F.conv2d(flat, kernel.view(1, 1, 1, -1), padding="same").view_as(gradient)


def succeeded(before: Tensor, after: Tensor, goal: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """Which attacks brought success, bool (B,), and which could: those of samples that were no success before, bool (B,).

    Args:
        before: class predicted for the clean sample (B,).
        after: class predicted under the attack (B,).
        goal: the right class, or that to reach if ``targeted`` (B,).
        targeted: whether success is to predict ``goal`` rather than something else.
    """
    could = (before == goal) != targeted
    return could & ((after == goal) == targeted), could
