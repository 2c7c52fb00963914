"""Image files of objects, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .hashing import uniform
from .images import Images

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ViewFiles(Images):
    """Images of files, with a shorter side of ``resize`` pixels and cut to ``image_size``, decoded when they are read.

    The part in the middle is taken; with a key a random part, mirrored half of the time. What is transparent shows the
    background. Greyscale becomes RGB.

    Args:
        root: folder that the names are below.
        names: of the N files.
        labels: int64 (N,).
        image_size: height and width of what is read.
        resize: length of the shorter side before the cut.
        background: grey value in [0, 1].

    Raises:
        FileNotFoundError: if a file is missing; all are looked for at once.
        ValueError: if a file, when it is read, is no image.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: Tensor, image_size: int, resize: int, background: float = 1.0
    ) -> None:
        self.root, self.labels, self.background = Path(root), labels, background
        self.image_size, self.resize = image_size, resize
        # One array instead of a million strings: counting references would copy those into every worker.
        self.names = np.array([os.fsencode(name) for name in names])
        there: dict[str, set[str]] = {}
        missing = []
        for name in names:
            folder, _, file = name.rpartition("/")
            if folder not in there:
                there[folder] = _files(self.root / folder)
            if file not in there[folder]:
                missing.append(name)
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} images that are listed are not in {self.root}, such as {missing[0]}: complete "
                "the folder, or leave them out with skip_missing"
            )

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        path = self.root / os.fsdecode(self.names[position])
        try:
            with Image.open(path) as file:
                image = self._opaque(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): remove or replace it") from error
        across, down, mirrored = (0.5, 0.5, False) if key is None else _random_part(key)
        image = self._cut(image, across, down)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[position])

    def _opaque(self, image: Image.Image) -> Image.Image:
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            return image.convert("RGB")
        behind = Image.new("RGBA", image.size, (round(255 * self.background),) * 3 + (255,))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")

    def _cut(self, image: Image.Image, across: float, down: float) -> Image.Image:
        """The part that leaves this share of what is cut away to its left and above."""
        scale = self.resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = int(across * (image.width - self.image_size)), int(down * (image.height - self.image_size))
        return image.crop((left, top, left + self.image_size, top + self.image_size))


def image_names(folder: Path) -> list[str]:
    """Sorted names of the images directly in a folder."""
    return sorted(name for name in _files(folder) if name.lower().endswith(ENDINGS))


def _files(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_file()} if folder.is_dir() else set()


def _random_part(key: Tensor) -> tuple[float, float, bool]:
    across, down, mirrored = uniform(key, torch.arange(3)).tolist()
    return across, down, mirrored < 0.5
