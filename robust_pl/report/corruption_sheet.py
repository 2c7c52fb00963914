"""One image under every corruption and severity, to be looked at."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..functional.corruptions.apply import corrupt
from ..functional.corruptions.tables import CORRUPTIONS, SEVERITIES, Table
from .pictures import font, picture

_GAP, _LINE, _NAMES = 4, 16, 124


def draw_corruption_sheet(image: Tensor, cell: int = 112, seed: int = 0, table: Table | None = None) -> Image.Image:
    """A row for each corruption: the image as it is, and at severity 1 to 5.

    Args:
        image: pixels (3, H, W) in [0, 1].
        cell: width and height of a picture on the sheet.
        seed: of the corruptions.
        table: see :func:`robust_pl.functional.corruptions.corrupt`.
    """
    x, index = image.unsqueeze(0), torch.zeros(1, dtype=torch.int64)
    step = cell + _GAP
    canvas = Image.new("RGB", (_NAMES + (1 + len(SEVERITIES)) * step, _LINE + len(CORRUPTIONS) * step), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = font()
    for column, text in enumerate(("as it is", *map(str, SEVERITIES))):
        pen.text((_NAMES + column * step, 1), text, fill="black")
    for row, name in enumerate(CORRUPTIONS):
        top = _LINE + row * step
        pen.text((2, top + cell // 2 - _LINE // 2), name, fill="black")
        shown = [x, *(corrupt(x, name, severity, index, seed, table) for severity in SEVERITIES)]
        for column, one in enumerate(shown):
            canvas.paste(picture(one[0], (cell, cell)), (_NAMES + column * step, top))
    return canvas
