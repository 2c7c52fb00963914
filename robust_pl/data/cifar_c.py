"""CIFAR-10-C and CIFAR-100-C from their published files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..functional.corruptions.apply import check_corruptions
from ..functional.corruptions.tables import SEVERITIES
from .array_file import MappedArray, map_npy
from .base import ImageDataModule
from .cifar import CIFAR10DataModule, CIFAR100DataModule
from .images import Images, ImagesInMemory

LABELS = "labels.npy"


class CIFARCFiles:
    """Published corrupted images, mapped into memory: of N test images, row (severity - 1) * N + i is image i.

    Args:
        root: folder of ``labels.npy`` and of an array uint8 (5 N, 32, 32, 3) for each corruption, such as ``fog.npy``.
        corruptions: those that will be read.
        severities: those that will be read.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged or of another form, or a severity is missing.
    """

    def __init__(self, root: Path, corruptions: Sequence[str], severities: Sequence[int] = SEVERITIES) -> None:
        check_corruptions(list(corruptions), list(severities))
        self.root = root
        labels = _map(root / LABELS)
        if len(labels.shape) != 1 or labels.dtype.kind not in "iu" or len(labels) % len(SEVERITIES):
            raise ValueError(f"{labels.path} must hold the classes of 5 x N images, not {labels.dtype} {labels.shape}")
        self.labels = torch.from_numpy(labels.read(slice(None)).astype(np.int64))
        self.images = {name: _map(root / f"{name}.npy") for name in corruptions}
        for images in self.images.values():
            if len(images.shape) != 4 or images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
                raise ValueError(
                    f"{images.path} must hold colour images of 32 x 32 pixels, uint8 (5 N, 32, 32, 3), not {images.dtype} "
                    f"{images.shape}"
                )
            if len(images) > len(self.labels):
                raise ValueError(
                    f"{images.path} holds {len(images)} images and {labels.path} {len(self.labels)} classes, which must be as "
                    "many as there are images at all five severities: fetch both again"
                )
            if len(images) < max(severities) * len(self):
                raise ValueError(
                    f"{images.path} holds {len(images)} images, and with {len(self)} of each severity "
                    f"severity {len(images) // len(self) + 1} is missing: fetch it again, or leave that severity out"
                )

    def __len__(self) -> int:
        """Images of each severity."""
        return len(self.labels) // len(SEVERITIES)

    def read(self, name: str, severity: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (B, 3, 32, 32) and classes int64 (B,) of the images ``index``, int64 (B,) on the CPU."""
        rows = index + (severity - 1) * len(self)
        return torch.from_numpy(self.images[name].read(rows.numpy())).permute(0, 3, 1, 2), self.labels[rows]


def _map(path: Path) -> MappedArray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the folder that holds the unpacked CIFAR-10-C or CIFAR-100-C")
    return map_npy(path)


class CIFAR10CDataModule(ImageDataModule):
    """CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) under one corruption at one severity: 10,000 test images.

    To measure all of them, give the callback :class:`robust_pl.callbacks.Corruptions` the folder as ``files`` in a test on
    CIFAR-10. There is nothing to train on.

    Args:
        corruption: such as ``gaussian_noise``; the name of a file without its ending.
        severity: 1 to 5.
        data_dir: the folder that holds ``CIFAR-10-C`` as it was unpacked; default the environment variable ROBUST_PL_DATA, else
            ``./data``.
        eval_batch_size: samples a batch.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if an argument is unknown, or a file is damaged or of another form.
    """

    class_names = CIFAR10DataModule.class_names
    image_shape = (3, 32, 32)

    folder = "CIFAR-10-C"

    def __init__(self, corruption: str, severity: int, data_dir: str | None = None, eval_batch_size: int = 128) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, val_size=0, augment=False)
        check_corruptions([corruption], [severity])
        self.corruption, self.severity = corruption, severity

    @cached_property
    def files(self) -> CIFARCFiles:
        return CIFARCFiles(self.data_dir / self.folder, [self.corruption], [self.severity])

    def load_train(self) -> Images:
        raise ValueError(f"{self.folder} is a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ImagesInMemory:
        images, labels = self.files.read(self.corruption, self.severity, torch.arange(len(self.files)))
        return ImagesInMemory(images.contiguous(), labels)


class CIFAR100CDataModule(CIFAR10CDataModule):
    """CIFAR-100-C, likewise: the folder in ``data_dir`` is ``CIFAR-100-C``."""

    class_names = CIFAR100DataModule.class_names

    folder = "CIFAR-100-C"
