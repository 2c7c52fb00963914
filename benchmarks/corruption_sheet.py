"""A sheet of every corruption and severity to look at: ``python -m benchmarks.corruption_sheet SHEET [IMAGE]``.

Without an image that of a procedural chair is taken, rendered here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_pl.report import draw_corruption_sheet
from robust_pl.scenes import MeshRasterizer
from robust_pl.scenes.orbit import orbit
from robust_pl.scenes.paint import Numbers, random_picture
from robust_pl.scenes.solids import make_solid

_BACKGROUND = (3, 7)


def procedural(size: int) -> Tensor:
    """A chair before a pattern, pixels (3, size, size)."""
    view = MeshRasterizer(make_solid("chair", 3), (size, size), supersampling=2).render(
        orbit(torch.tensor([-60.0]), torch.tensor([25.0]), 3.0)
    )
    pattern = random_picture(Numbers(*_BACKGROUND)).permute(2, 0, 1).unsqueeze(0)
    behind = 0.7 * torch.nn.functional.interpolate(pattern, (size, size), mode="bilinear")
    return view.over(behind)[0].clamp(0, 1)


def read(path: Path, size: int) -> Tensor:
    """The middle of a picture, pixels (3, size, size)."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def main(argv: list[str] | None = None) -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption_sheet", description="All corruptions of one image.")
    parser.add_argument("sheet", type=Path, help="file to write, such as sheet.png")
    parser.add_argument("image", type=Path, nargs="?", help="any picture")
    parser.add_argument("--size", type=int, default=224, help="height and width at which it is corrupted, such as 32 or 224")
    parser.add_argument("--cell", type=int, default=112, help="height and width on the sheet")
    parser.add_argument("--colors", type=int, help="of the file, up to 256; by default all")
    args = parser.parse_args(argv)
    for name, least in (("size", 8), ("cell", 16)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    image = procedural(args.size) if args.image is None else read(args.image, args.size)
    sheet = draw_corruption_sheet(image, args.cell)
    if args.colors is not None:
        sheet = sheet.quantize(args.colors, dither=Image.Dither.NONE)
    sheet.save(args.sheet, optimize=True)
    print(args.sheet)


if __name__ == "__main__":
    main()
