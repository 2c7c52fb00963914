"""Grids of images."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL, _GAP, _CAPTION, _MARGIN = 96, 6, 16, 110

Caption = tuple[str, bool]
"""A text and whether it is right; what is wrong is red."""


def grid(x: Tensor, x_adv: Tensor, captions: list[list[Caption]]) -> Image.Image:
    """Three rows of pictures with captions: clean, adversarial, and their difference, magnified.

    The difference is magnified so that its largest entry in the grid fills the range, around mid-grey.

    Args:
        x: clean pixels (N, C, H, W) in [0, 1] on the CPU.
        x_adv: attacked pixels, alike.
        captions: for each row and column a text and whether it is right.
    """
    delta = x_adv - x
    magnify = 0.5 / delta.abs().max().clamp_min(1e-8).item()
    rows = [("clean", x), ("adversarial", x_adv), (f"difference\nx {magnify:.3g}", 0.5 + magnify * delta)]
    height = len(rows) * (_CELL + _CAPTION + _GAP) + _GAP
    canvas = Image.new("RGB", (_MARGIN + len(x) * (_CELL + _GAP), height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = font()
    for r, (title, images) in enumerate(rows):
        top = _GAP + r * (_CELL + _CAPTION + _GAP)
        pen.text((_GAP, top + _CELL // 2 - 8), title, fill="black")
        for c, image in enumerate(images):
            left = _MARGIN + c * (_CELL + _GAP)
            canvas.paste(picture(image, (_CELL, _CELL)), (left, top))
            text, right = captions[r][c]
            pen.text((left, top + _CELL + 1), fitting(pen, text, _CELL), fill="black" if right else "red")
    return canvas


@cache
def font() -> ImageFont.FreeTypeFont:
    """The letters of the plots; Pillow's own lack some of those that reports need."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)


def fitting(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of the text as goes into so many pixels."""
    while pen.textlength(text) > width:
        text = text[:-1]
    return text


def picture(image: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Pixels (C, H, W) in [0, 1] in RGB, of C one or three; enlarged or reduced to a width and height."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    drawn = Image.fromarray(pixels)
    if size is None or size == drawn.size:
        return drawn
    # Nearest neighbour, so that single attacked pixels stay visible.
    return drawn.resize(size, Image.Resampling.NEAREST if size[0] >= drawn.width else Image.Resampling.LANCZOS)
