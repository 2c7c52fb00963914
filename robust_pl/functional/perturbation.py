"""How large a perturbation is in both norms, and how much of its ball it fills: what transfer grows with.

At the same linf radius, attacks that transfer better often are simply longer in l2 (Chen et al. 2021, arXiv 2102.10343), so
two of them are compared fairly only at the same l2 size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Norm, size

_TINY = 1e-12


class Sizes(NamedTuple):
    """Sizes of a batch of perturbations, each (B,).

    Args:
        l2: Euclidean length.
        linf: largest change of a pixel.
        saturation: l2 length divided by the largest that the ball allows, in [0, 1] but for rounding.
    """

    l2: Tensor
    linf: Tensor
    saturation: Tensor


def perturbation_sizes(x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: Norm = "linf") -> Sizes:
    """Both sizes of ``x_adv - x`` and the saturation ``s = |d|_2 / (eps * sqrt(D))`` of D pixel values.

    Args:
        x_adv: perturbed pixels (B, C, H, W).
        x: clean pixels, likewise.
        eps: radius of the ball, a number or (B, 1, 1, 1). Where it is 0, so is the saturation.
        norm: of the ball; an l2 or l1 ball allows an l2 length of eps.
    """
    delta = x_adv - x
    l2 = size(delta, "l2")
    bound = torch.as_tensor(eps, dtype=l2.dtype, device=l2.device).flatten()
    if norm == "linf":
        bound = bound * delta[0].numel() ** 0.5
    return Sizes(l2, size(delta, "linf"), l2 / bound.clamp_min(_TINY))


def saturated(x_adv: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """The perturbation with every pixel pushed to the edge of the linf ball: x + eps * sign(d), cut to the box.

    An attack whose advantage this adds to another attack as well owes it to the size of its perturbations. The check is ours
    and not the paper's.
    """
    return (x + eps * (x_adv - x).sign()).clamp(0.0, 1.0)


def per_pixel(length: float | Tensor, x: Tensor, norm: Norm) -> float | Tensor:
    """What each pixel changes by where a change of size ``length`` is spread evenly: the length itself for linf."""
    pixels = x[0].numel()
    return length / {"linf": 1.0, "l2": pixels**0.5, "l1": float(pixels)}[norm]


def eight_bit(x: Tensor) -> Tensor:
    """Pixels as an image file keeps them: the nearest multiples of 1/255."""
    return (x * 255).round() / 255
