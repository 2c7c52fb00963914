"""ImageNet-C from its published files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..functional.corruptions.apply import check_corruptions
from .image_files import ImageFiles, labelled, read_image
from .imagenet_sets import ImageNetSet, check_folders
from .label_maps import imagenet_wnids

_THREADS = 8
_SIZE = 224


class ImageNetCFiles:
    """Published corrupted images in folders ``<corruption>/<severity>/<class>/<file>``, files named as the originals.

    Args:
        root: that holds the folders of the corruptions.
        corruptions: those that will be read.
        severities: those that will be read.
        names: ``<class>/<file>`` of each of the N test images.
        labels: int64 (N,).
        size: height and width of the images.

    Raises:
        FileNotFoundError: if a folder is missing.
    """

    def __init__(
        self,
        root: Path,
        corruptions: Sequence[str],
        severities: Sequence[int],
        names: Sequence[str],
        labels: Tensor,
        size: int = _SIZE,
    ) -> None:
        check_corruptions(list(corruptions), list(severities))
        self.root, self.names, self.labels, self.size = root, names, labels, size
        for name in corruptions:
            for severity in severities:
                folder_of(root, name, severity)

    def __len__(self) -> int:
        """Images of each severity."""
        return len(self.names)

    def read(self, name: str, severity: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (B, 3, H, W) and classes int64 (B,) of the images ``index``, int64 (B,) on the CPU.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if one cannot be read or is of another size.
        """
        folder = self.root / name / str(severity)
        paths = [folder / self.names[i] for i in index.tolist()]
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(lambda path: read_sized(path, self.size), paths))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self.labels[index]


def folder_of(root: Path, corruption: str, severity: int) -> Path:
    """The class folders of one corruption and severity.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = root / corruption / str(severity)
    if not folder.is_dir():
        missing = f"severity {severity} of {corruption}" if folder.parent.is_dir() else corruption
        raise FileNotFoundError(
            f"{folder} does not exist, so {missing} is missing: name the folder that holds ImageNet-C's "
            "<corruption>/<severity>/<class>, or leave it out"
        )
    return folder


def read_sized(path: Path, size: int) -> np.ndarray:
    """Pixels uint8 (size, size, 3), as they are in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or is of another size.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: unpack ImageNet-C again, all of it")
    image = read_image(path)
    if image.size != (size, size):
        raise ValueError(
            f"{path} is an image of {image.width} x {image.height} pixels, not {size} x {size}: ImageNet-C is cut to size "
            "before it is corrupted, so take the files as they were published"
        )
    return np.asarray(image)


class _SizedFiles(ImageFiles):
    """Images that are not resized."""

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        pixels = read_sized(self.path(position), self.image_size)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), int(self.labels[position])


class ImageNetCDataModule(ImageNetSet):
    """ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) under one corruption at one severity: 50,000 test images.

    Images were resized, cut to 224 x 224 pixels and corrupted before they were published, so they are read as they are. To
    measure all of them, give the callback :class:`robust_pl.callbacks.Corruptions` the folder as ``files`` in a test on
    ImageNet.

    Args:
        corruption: such as ``gaussian_noise``; the name of a folder.
        severity: 1 to 5.
        data_dir: folder of the folders ``<corruption>/<severity>/<class>``, or what holds it as ``ImageNet-C`` or
            ``imagenet-c``; default the environment variable ROBUST_PL_DATA, else ``./data``.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met;
            costs one more pass over the files.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if an argument is unknown, the folders are not ImageNet's classes, or an image cannot be read.
    """

    title = "ImageNet-C"

    def __init__(
        self,
        corruption: str,
        severity: int,
        data_dir: str | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, num_workers, _SIZE, _SIZE, skip_damaged)
        check_corruptions([corruption], [severity])
        self.corruption, self.severity = corruption, severity

    @cached_property
    def labels(self) -> dict[str, int]:
        return {wnid: label for label, wnid in enumerate(imagenet_wnids())}

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """WordNet numbers."""
        return list(imagenet_wnids())

    @property
    def root(self) -> Path:
        below = (self.data_dir / name for name in ("ImageNet-C", "imagenet-c"))
        root = next((path for path in below if path.is_dir()), self.data_dir)
        return folder_of(root, self.corruption, self.severity)

    def load_test(self) -> ImageFiles:
        check_folders(self.root, self.labels, self.title, self._remedy())
        names, labels = labelled(self.root, self.labels)
        return _SizedFiles(self.root, names, labels, _SIZE, _SIZE, skip_damaged=self.skip_damaged)
