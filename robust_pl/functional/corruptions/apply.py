"""Corrupt a batch of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..hashing import hash_keys, seed_from
from . import blur, digital, noise, weather
from .draws import Draws
from .rounding import truncated
from .spatter import spatter
from .tables import CORRUPTIONS, PARAMETERS, SEVERITIES, Table

_MAKERS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter,
    "saturate": digital.saturate,
}
_SMALL, _SMALLEST = 96, 8
_VALUES = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Values of a batch that are worked on at once: what the caches of a core hold, and what leaves room in a device's memory."""


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    index: Tensor,
    seed: int = 0,
    table: Table | None = None,
) -> Tensor:
    """Corrupt images as Hendrycks and Dietterich (2019, arXiv 1903.12261) do.

    The result is a function of the image, its index and the other arguments alone, and not of the batch or the device: random
    numbers come from a hash of (seed, corruption, severity, index), and sums are in float64. Images are read as those of 8 bit,
    and results are truncated to 8 bit, as the benchmark's are. Works on whole batches, a part that fits the caches or the
    device after the other, without a loop over samples; but JPEG is Pillow's and takes one image at a time, on the CPU. On
    Apple's GPUs, which have no float64, all is done on the CPU.

    Not comparable file by file with the published images, whose random numbers nobody has: and motion blur, snow, frost and
    spatter are reconstructed, see there. The rest follows the published code, JPEG up to Pillow's version.

    Args:
        x: pixels in [0, 1], floating (B, 3, H, W), cropped to what the network sees.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        index: position of each sample in its data set, int64 (B,).
        seed: of the random numbers.
        table: parameters, those of ``cifar`` or of ``imagenet``; None takes those of ``cifar`` for images whose shorter side is
            less than 96 pixels.

    Returns:
        Corrupted pixels, multiples of 1/255 in [0, 1], of x's type and device.

    Raises:
        ValueError: if an argument is none of these.
    """
    check_corruptions([name], [severity])
    _check(x, index)
    table = table or table_for(x.shape[-2:])
    if table not in ("cifar", "imagenet"):
        raise ValueError(f"table={table!r} is unknown: choose cifar or imagenet")
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    keys = hash_keys(seed, seed_from(name), severity, index.to(device))
    parameters = PARAMETERS[name][table][severity - 1]
    size = max(1, _VALUES.get(device.type, _VALUES["cpu"]) // max(1, x[:1].numel()))
    parts = []
    for part, own in zip(x.to(device).split(size), keys.split(size), strict=True):
        pixels = (part.contiguous().double() * 255).round() / 255
        parts.append(truncated(_MAKERS[name](pixels, Draws(own), *parameters)).to(x.dtype))
    return torch.cat(parts).to(x.device)


def table_for(size: tuple[int, ...]) -> Table:
    """The parameters for images of some height and width."""
    return "cifar" if min(size) < _SMALL else "imagenet"


def check_corruptions(names: list[str], severities: list[int]) -> None:
    """Refuse what is no corruption or severity.

    Raises:
        ValueError: if there is such a one.
    """
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(f"corruption {name!r} is unknown: choose among {', '.join(CORRUPTIONS)}")
    for severity in severities:
        if severity not in SEVERITIES:
            raise ValueError(f"severity={severity} must be one of 1, 2, 3, 4, 5")


def _check(x: Tensor, index: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or min(x.shape[-2:]) < _SMALLEST:
        raise ValueError(
            f"corruptions need colour images, floating (B, 3, H, W) of at least {_SMALLEST} x {_SMALLEST} pixels, not "
            f"{x.dtype} {tuple(x.shape)}"
        )
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must hold the position of each of {len(x)} images, not {tuple(index.shape)}")
    if len(x) and not (x.amin() >= 0 and x.amax() <= 1):
        raise ValueError("corruptions were given images with values outside [0, 1] or NaN: leave normalisation to the network")
