"""Many pictures on one sheet, each with a few lines below it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from .pictures import Caption, fitting, font, picture

_CELL, _GAP, _LINE = 144, 10, 15


def draw_contact_sheet(images: Sequence[Tensor], captions: Sequence[Sequence[Caption]], columns: int = 6) -> Image.Image:
    """Pictures in rows, with their captions.

    Args:
        images: pixels (C, H, W) in [0, 1] of each, of any size; drawn 144 pixels wide.
        captions: for each its lines, a text and whether it is right; what is wrong is red, what is too long is cut.
        columns: pictures side by side.

    Raises:
        ValueError: if there is no picture, or there are not as many captions.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give as many of each, and at least one")
    drawn = [picture(image, (_CELL, round(_CELL * image.shape[1] / image.shape[2]))) for image in images]
    columns, lines = min(columns, len(drawn)), max(map(len, captions))
    tall = max(image.height for image in drawn) + 4 + _LINE * lines + _GAP
    rows = -(-len(drawn) // columns)
    canvas = Image.new("RGB", (_GAP + columns * (_CELL + _GAP), _GAP + rows * tall), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = font()
    for number, (image, said) in enumerate(zip(drawn, captions, strict=True)):
        left, top = _GAP + number % columns * (_CELL + _GAP), _GAP + number // columns * tall
        canvas.paste(image, (left, top))
        pen.rectangle((left, top, left + image.width - 1, top + image.height - 1), outline="#D0D0D0")
        for line, (text, right) in enumerate(said):
            below = top + image.height + 4 + line * _LINE
            pen.text((left, below), fitting(pen, text, _CELL), fill="black" if right else "#C00000")
    return canvas
