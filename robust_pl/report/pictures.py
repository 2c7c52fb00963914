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
    pen.font = _font()
    for r, (title, images) in enumerate(rows):
        top = _GAP + r * (_CELL + _CAPTION + _GAP)
        pen.text((_GAP, top + _CELL // 2 - 8), title, fill="black")
        for c, image in enumerate(images):
            left = _MARGIN + c * (_CELL + _GAP)
            canvas.paste(_cell(image), (left, top))
            text, right = captions[r][c]
            pen.text((left, top + _CELL + 1), _fitting(pen, text), fill="black" if right else "red")
    return canvas


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The letters of the plots; Pillow's own lack some of those that reports need."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)


def _fitting(pen: ImageDraw.ImageDraw, text: str) -> str:
    while pen.textlength(text) > _CELL:
        text = text[:-1]
    return text


def _cell(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    # Nearest neighbour, so that single attacked pixels stay visible.
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)
