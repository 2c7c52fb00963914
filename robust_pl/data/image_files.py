"""Image files in class folders, decoded when they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from rich.progress import track
from torch import Tensor

from .decode import UNREADABLE, decode, visible_part
from .images import Images

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_THREADS = 8
_SHOWN_FROM = 5_000


class ImageFiles(Images):
    """Labelled image files, with a shorter side of ``resize`` pixels and cut to the middle ``image_size``.

    With a key a random part is cut, resized and mirrored half of the time, see :func:`robust_pl.data.decode.random_part`.
    Greyscale becomes RGB.

    Args:
        root: folder that the names are below.
        names: of the N files.
        labels: int64 (N,).
        image_size: height and width of what is read.
        resize: length of the shorter side before the cut.
        border: pixels to cut off each side first.
        skip_damaged: decode every file once now, and leave out, with a warning that counts and names them, those that cannot be
            read; ``skipped`` holds their paths. That costs one pass over the set, which is why it is not the default.

    Raises:
        ValueError: if a file, when it is read, is no image or too small; or if none can be read.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Tensor,
        image_size: int,
        resize: int,
        border: int = 0,
        skip_damaged: bool = False,
    ) -> None:
        self.root, self.image_size, self.resize, self.border = Path(root), image_size, resize, border
        # One array instead of a million strings: counting references would copy those into every worker.
        self.names, self.labels = np.array([os.fsencode(name) for name in names]), labels
        self.skipped: list[Path] = []
        if skip_damaged:
            self._skip()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, position: int) -> Path:
        """Of a file."""
        return self.root / os.fsdecode(self.names[position])

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        image = read_image(self.path(position))
        if self.border:
            if min(image.size) <= 2 * self.border:
                raise ValueError(
                    f"{self.path(position)} is an image of {image.width} x {image.height} pixels, too small to cut off a "
                    f"border of {self.border}: replace it by the original"
                )
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        image = visible_part(image, self.resize, self.image_size, key)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[position])

    def _skip(self) -> None:
        paths = [self.path(i) for i in range(len(self))]
        good = undamaged(self.root, paths)
        self.skipped = [path for path, fine in zip(paths, good, strict=True) if not fine]
        self.names, self.labels = self.names[good], self.labels[torch.from_numpy(good)]


def undamaged(root: Path, paths: Sequence[Path]) -> np.ndarray:
    """Which files can be read as images, bool (N,); a warning counts and names the others. Decodes every file.

    Args:
        root: that they are below, for sentences.
        paths: of the N files.

    Raises:
        ValueError: if none can be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = track(
            pool.map(_readable, paths),
            f"Looking for damaged images in {root}",
            len(paths),
            transient=True,
            disable=len(paths) < _SHOWN_FROM,
        )
        good = np.array(list(looked), bool)
    if not good.any():
        raise ValueError(f"none of the {len(paths)} images in {root} can be read, such as {paths[0]}: unpack the set again")
    if skipped := [path for path, fine in zip(paths, good, strict=True) if not fine]:
        named = ", ".join(str(path) for path in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        rank_zero_warn(f"skipped {len(skipped)} of {len(paths)} images that cannot be read: {named}")
    return good


def read_image(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        return decode(path.read_bytes())
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}): replace or remove it, or set skip_damaged to true to leave such out"
        ) from error


def labelled(root: Path, labels: Mapping[str, int]) -> tuple[list[str], Tensor]:
    """Names below the root of the images in each folder, folder by folder, and their labels int64 (N,).

    Args:
        root: that holds the folders.
        labels: folder -> label; a folder may be missing.

    Raises:
        FileNotFoundError: if there is no image at all.
    """
    names: list[str] = []
    numbers: list[int] = []
    for folder, label in labels.items():
        found = image_names(root / folder)
        names += [f"{folder}/{name}" for name in found]
        numbers += [label] * len(found)
    if not names:
        raise FileNotFoundError(f"{root} holds no images ({', '.join(ENDINGS)}) in its class folders")
    return names, torch.tensor(numbers)


def subfolders(root: Path, remedy: str) -> list[str]:
    """Sorted names of the folders in a folder.

    Args:
        root: the folder.
        remedy: what to do where there are none.

    Raises:
        FileNotFoundError: if there are none.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{root} does not exist or holds no class folders: {remedy}")
    return names


def image_names(folder: Path) -> list[str]:
    """Sorted names of the images directly in a folder; none if it is missing, since an evaluation set may lack a class."""
    names = (entry.name for entry in os.scandir(folder)) if folder.is_dir() else ()
    return sorted(name for name in names if name.lower().endswith(ENDINGS))


def _readable(path: Path) -> bool:
    try:
        with Image.open(path) as file:
            file.load()  # decoding lets other threads run
    except UNREADABLE:
        return False
    return True
