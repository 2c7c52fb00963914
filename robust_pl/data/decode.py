"""Decoding of pictures, and the parts of them that a network sees."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from types import ModuleType

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .hashing import uniform

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_TRIES = 10


def decode(content: bytes) -> Image.Image:
    """A picture in RGB, from a file's content: JPEG by torchvision where it can be imported, all else by pillow.

    Both use libjpeg, whose releases may round pixels otherwise. Whoever decodes, pillow resizes, so that no accuracy depends
    on what is installed: torchvision's own resizing of tensors gives other pixels.

    Raises:
        OSError: or another of ``UNREADABLE``, if it is no picture.
    """
    pixels = _jpeg(content) if content.startswith(b"\xff\xd8") else None
    if pixels is not None:
        return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    try:
        with Image.open(BytesIO(content)) as file:
            return file.convert("RGB")
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"its {len(content)} bytes are of no format that pillow knows") from None


def visible_part(image: Image.Image, resize: int, image_size: int, key: Tensor | None) -> Image.Image:
    """What the network sees: without a key the middle, see :func:`centre_part`, else :func:`random_part`."""
    return centre_part(image, resize, image_size) if key is None else random_part(image, image_size, key)


def centre_part(image: Image.Image, resize: int, image_size: int) -> Image.Image:
    """The middle ``image_size`` x ``image_size`` of the picture with a shorter side of ``resize`` pixels."""
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def random_part(image: Image.Image, image_size: int, key: Tensor) -> Image.Image:
    """A part that the key says, see :func:`random_box`, resized to ``image_size`` x ``image_size`` and perhaps mirrored."""
    left, top, width, height = random_box(image.width, image.height, key)
    image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    flip = uniform(key, 4 * _TRIES) < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def random_box(width: int, height: int, key: Tensor) -> tuple[int, int, int, int]:
    """The part of an image to train on, (left, top, width, height): area 0.08 to 1, aspect 3/4 to 4/3 on a log scale.

    The first of ten tries that fits is taken; if none fits, the largest box in the middle of the nearest aspect.
    """
    area, aspect, x, y = uniform(key, torch.arange(4 * _TRIES)).view(4, _TRIES)
    area = width * height * (0.08 + 0.92 * area)
    aspect = (4 / 3) ** (2 * aspect - 1)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = ((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)).nonzero()
    if len(fits):
        t = int(fits[0])
        w, h = int(widths[t]), int(heights[t])
        return int(x[t] * (width - w + 1)), int(y[t] * (height - h + 1)), w, h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


@cache
def _torchvision() -> ModuleType | None:
    try:
        import torchvision.io
    except (ImportError, OSError, RuntimeError):  # also one that was built for another torch
        return None
    return torchvision.io


def _jpeg(content: bytes) -> Tensor | None:
    """Pixels uint8 (1 or 3, H, W); None where pillow should look: at what is damaged, and at four colours."""
    library = _torchvision()
    if library is None:
        return None
    try:
        pixels = library.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:
        return None
    return pixels if len(pixels) in (1, 3) else None
