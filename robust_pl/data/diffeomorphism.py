"""Smooth random deformations of images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentations import Augmentation, unrounded
from .hashing import integers, normal, uniform

_CUTOFF, _CUT, _TEMPERATURE, _FIELD = 0, 1, 2, 3


class Diffeomorphism(Augmentation):
    """PRIME's spatial primitive (Modas et al. 2022, arXiv 2112.13547): pixels taken from places that a smooth field moves.

    Along each axis a place moves by ``sqrt(T) n u`` pixels, u = sum_ij a_ij sin(pi i x) sin(pi j y) over i, j >= 1 with
    sqrt(i^2 + j^2) < c + 1/2, and a_ij ~ N(0, 1 / (i^2 + j^2)). With C ~ U{3, ..., cutoff} the frequency c is a cut of 2 ... C
    by a number of the arcsine distribution, and so is T between 1 / (pi n^2 log c), half a pixel on average, and
    4 / (pi^3 c^2 log c), where the image would begin to fold. With the authors' cutoff of 100, images of n = 32 are moved by
    half a pixel more often than not, since the second is below the first from c = 21 on.

    The authors draw one field for a whole batch; here every sample has its own. What frequencies above n do on a grid of n
    points is what lower ones do, so no more than (n - 2)^2 numbers are drawn, of the same distribution. The table of their
    variances takes ``4 (cutoff + 1) (n - 2)^2`` bytes, 99 MB at n = 224 with a cutoff of 500.

    Args:
        cutoff: largest frequency, at least 3: 100 on CIFAR, 500 on ImageNet.
        strength: what the upper end of T is multiplied by, in (0, 1].

    Raises:
        ValueError: if an argument is out of range, or images are not square or have fewer than 3 pixels a side.
    """

    def __init__(self, cutoff: int = 100, strength: float = 1.0) -> None:
        if cutoff < 3:
            raise ValueError(f"cutoff={cutoff} is the largest frequency: it must be at least 3")
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must lie in (0, 1]: above 1 images fold")
        self.cutoff, self.strength = cutoff, strength
        self._variances: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[3]
        if x.shape[2] != n or n < 3:
            raise ValueError(f"images have shape {tuple(x.shape[1:])}: a diffeomorphism needs square ones of 3 pixels or more")
        place = torch.arange(n, device=x.device).float()
        right, down = self.displacement(keys, n).unbind(1)
        grid = torch.stack([(place - right).clamp(0, n - 1), (place.unsqueeze(1) - down).clamp(0, n - 1)], 3) * 2 / (n - 1) - 1
        return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=True).to(x.dtype), y

    def law(self, keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The frequency c, int64 (B,), and the temperature T, float64 (B,), of each sample."""
        most = 3 + integers(keys, _CUTOFF, self.cutoff - 2)
        cut = (_arcsine(uniform(keys, _CUT)) * (most - 1) + 2).long().minimum(most)
        half_pixel = 1 / (math.pi * n**2 * cut.double().log())
        folding = half_pixel.maximum(self.strength * 4 / (math.pi**3 * cut.double() ** 2 * cut.double().log()))
        return cut, half_pixel + _arcsine(uniform(keys, _TEMPERATURE)) * (folding - half_pixel)

    def displacement(self, keys: Tensor, n: int) -> Tensor:
        """How far each pixel's colour comes from the left, and from above, in pixels: float32 (B, 2, n, n), 0 at the edges."""
        cut, temperature = self.law(keys, n)
        if self._variances is None or self._variances.shape[1] != n - 2 or self._variances.device != keys.device:
            self._variances = variances(self.cutoff, n).to(keys.device)
        place = torch.arange(n, device=keys.device).float()
        sines = torch.sin(torch.pi / (n - 1) * place[1:-1].unsqueeze(1) * place)
        numbers = normal(keys.unsqueeze(1), _FIELD + torch.arange(2 * (n - 2) ** 2, device=keys.device))
        a = numbers.view(-1, 2, n - 2, n - 2) * self._variances[cut].sqrt().unsqueeze(1)
        with unrounded(keys):
            return sines.T @ a @ sines * (temperature.sqrt().float() * n).view(-1, 1, 1, 1)


def variances(cutoff: int, n: int) -> Tensor:
    """Variance of each of the n - 2 x n - 2 sines that a grid of n points tells apart, for c = 0 ... cutoff, float32.

    At the points k / (n - 1), k = 0 ... n - 1, the sine of frequency i is that of i + 2 (n - 1), the negative of
    2 (n - 1) - i, and zero at n - 1.
    """
    frequency = torch.arange(1, cutoff + 1)
    folded = frequency % (2 * (n - 1))
    folded = folded.minimum(2 * (n - 1) - folded)
    square = frequency.unsqueeze(1) ** 2 + frequency**2
    first = (square.double().sqrt() - 0.5).floor().long() + 1  # the smallest c that holds it
    seen = (first <= cutoff) & ((folded % (n - 1)).unsqueeze(1) * (folded % (n - 1)) > 0)
    at = ((first * (n - 2) + folded.unsqueeze(1) - 1) * (n - 2) + folded - 1)[seen]
    table = torch.zeros((cutoff + 1) * (n - 2) ** 2, dtype=torch.float64)
    return table.scatter_add_(0, at, 1 / square[seen].double()).view(-1, n - 2, n - 2).cumsum(0).float()


def _arcsine(u: Tensor) -> Tensor:
    """Numbers of Beta(1/2, 1/2) from uniform ones."""
    return (u * torch.pi / 2).sin().square()
