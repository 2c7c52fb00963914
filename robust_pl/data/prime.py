"""PRIME and its primitives of colour and of frequency; that of space is in its own file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentations import Augmentation, unrounded
from .diffeomorphism import Diffeomorphism
from .hashing import integers, normal, uniform
from .mixed_chains import MixedChains

_KNOTS = 32  # for each half wave of the fastest sine: 0.12 % of its height off between them
_TEMPERATURE, _CUTOFF, _FIRST, _BETA = 0, 1, 2, 3
_SIGMA, _TAPS = 0, 1


class SmoothColor(Augmentation):
    """PRIME's colour primitive (Modas et al. 2022, arXiv 2112.13547): a smooth random curve of values for each channel.

    z becomes z + sum_k beta_k sin(pi k z), cut off to [0, 1], with beta_k ~ N(0, T), T ~ U(0, max_temperature), over
    k = 1 ... c with c ~ U{1, ..., cutoff}; with a bandwidth over that many from a first k ~ U{1, ..., c} on, up to c. 0 and 1
    stay. The authors draw T and c for a whole batch; here every sample has its own. The curve is read linearly between 32 knots
    for each half wave of the fastest sine.

    Args:
        cutoff: largest frequency, at least 1: 100 on CIFAR, 500 on ImageNet.
        max_temperature: at least 0: 0.01 on CIFAR, 0.05 on ImageNet.
        bandwidth: number of frequencies, at least 1: 20 on ImageNet; None takes all up to c.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, cutoff: int = 100, max_temperature: float = 0.01, bandwidth: int | None = None) -> None:
        if cutoff < 1:
            raise ValueError(f"cutoff={cutoff} is the largest frequency: it must be at least 1")
        if not 0 <= max_temperature < float("inf"):
            raise ValueError(f"max_temperature={max_temperature} must be a number of at least 0")
        if bandwidth is not None and bandwidth < 1:
            raise ValueError(f"bandwidth={bandwidth} is a number of frequencies: it must be at least 1, or none for all")
        self.cutoff, self.max_temperature, self.bandwidth = cutoff, max_temperature, bandwidth

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        knots = _KNOTS * self.cutoff
        k = torch.arange(1, self.cutoff + 1, device=x.device).float()
        z = torch.arange(knots + 1, device=x.device).float() / knots
        with unrounded(x):
            curve = self.coefficients(keys, x.shape[1]) @ torch.sin(torch.pi * k.unsqueeze(1) * z)
        place = (x.float() * knots).clamp(0, knots).flatten(2)
        below = place.long().clamp_max(knots - 1)
        change = torch.lerp(curve.gather(2, below), curve.gather(2, below + 1), place - below)
        return (x.float() + change.view(x.shape)).clamp(0, 1).to(x.dtype), y

    def coefficients(self, keys: Tensor, channels: int) -> Tensor:
        """beta_k, float32 (B, channels, cutoff)."""
        temperature, cut = self.max_temperature * uniform(keys, _TEMPERATURE), 1 + integers(keys, _CUTOFF, self.cutoff)
        k = torch.arange(1, self.cutoff + 1, device=keys.device)
        used = k <= cut.unsqueeze(1)
        if self.bandwidth is not None:
            first = 1 + (uniform(keys, _FIRST) * cut).long().unsqueeze(1)
            used &= (k >= first) & (k < first + self.bandwidth)
        numbers = normal(keys.unsqueeze(1), _BETA + torch.arange(channels * self.cutoff, device=keys.device))
        return numbers.view(len(keys), channels, -1) * (used * temperature.sqrt().float().unsqueeze(1)).unsqueeze(1)


class RandomFilter(Augmentation):
    """PRIME's frequency primitive (Modas et al. 2022, arXiv 2112.13547): a filter of random numbers on top of the identity.

    The taps are those of the identity plus sigma * N(0, 1), the same for all channels, with sigma ~ U(0, max_sigma); the result
    is cut off to [0, 1], and beyond its edges the image counts as black. In the authors' code the identity's tap is not the
    middle one but that right and below of it, which moves the image by a pixel to the upper left. They draw sigma for a whole
    batch; here every sample has its own.

    Args:
        max_sigma: at least 0; 4 is the authors'.
        size: taps along each side, odd and at least 3.
        centered: whether the identity's tap is the middle one, instead of the authors'.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, max_sigma: float = 4.0, size: int = 3, centered: bool = False) -> None:
        if not 0 <= max_sigma < float("inf"):
            raise ValueError(f"max_sigma={max_sigma} must be a number of at least 0")
        if size < 3 or size % 2 == 0:
            raise ValueError(f"size={size} is the side of the filter: choose 3, 5, 7 or another odd number")
        self.max_sigma, self.size, self.centered = max_sigma, size, centered

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        padded = F.pad(x.float(), (self.size // 2,) * 4)
        out = torch.zeros_like(x, dtype=torch.float32)
        for number, tap in enumerate(self.taps(keys).unbind(1)):
            row, column = divmod(number, self.size)
            out.addcmul_(tap.view(-1, 1, 1, 1), padded[:, :, row : row + height, column : column + width])
        return out.clamp_(0, 1).to(x.dtype), y

    def taps(self, keys: Tensor) -> Tensor:
        """The filters row by row, float32 (B, size * size)."""
        sigma = (self.max_sigma * uniform(keys, _SIGMA)).float().unsqueeze(1)
        taps = sigma * normal(keys.unsqueeze(1), _TAPS + torch.arange(self.size**2, device=keys.device))
        middle = self.size // 2 if self.centered else self.size // 2 + 1
        taps[:, middle * (self.size + 1)] += 1
        return taps


class PRIME(MixedChains):
    """PRIME (Modas et al. 2022, arXiv 2112.13547): mixed chains of smooth deformations, colour curves and random filters.

    With :class:`robust_pl.methods.AugMix` it has AugMix's consistency loss, as in the authors' runs on CIFAR; in the list
    ``augment`` it goes with any method. Float32 whatever the precision of the run; 8-bit levels are not kept.

    Args:
        operations: the primitives, with the authors' numbers for CIFAR by default; those for ImageNet are in
            ``configs/natural``.
        width: chains.
        depth: primitives in each; None draws 1, 2 or 3.
        alpha: of the mixing distributions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        operations: list[Augmentation] | None = None,
        width: int = 3,
        depth: int | None = None,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(
            [Diffeomorphism(), SmoothColor(), RandomFilter()] if operations is None else operations, width, depth, alpha
        )
