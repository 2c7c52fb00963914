"""Published corrupted images that belong to a test set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.cifar_c import LABELS, CIFARCFiles
from ...data.imagenet_c import ImageNetCFiles


class CorruptedFiles:
    """Corrupted images of a test set, whose classes must be the same.

    Args:
        root: folder of the files, for sentences.
        files: that are read.
    """

    def __init__(self, root: Path, files: CIFARCFiles | ImageNetCFiles) -> None:
        self.root, self.files = root, files

    def pixels(self, name: str, severity: int, index: Tensor, y: Tensor) -> Tensor:
        """Pixels float32 (B, 3, H, W) in [0, 1] of the images ``index`` (B,), on the CPU.

        Raises:
            ValueError: if they are of other classes than y (B,).
        """
        if int(index.max()) >= len(self.files):
            raise ValueError(
                f"files={self.root} holds {len(self.files)} images of each severity, and the test set more: take the files of "
                "this test set"
            )
        x, labels = self.files.read(name, severity, index)
        if not torch.equal(labels, y.cpu()):
            place = int((labels != y.cpu()).nonzero()[0])
            raise ValueError(
                f"files={self.root} has class {int(labels[place])} for image {int(index[place])}, and the test set "
                f"{int(y[place])}: take the files of this test set"
            )
        return x.to(torch.float32).div_(255)


def open_files(root: Path, corruptions: Sequence[str], severities: Sequence[int], data: Any) -> CorruptedFiles:
    """Files in one of both published forms.

    Args:
        root: folder with ``labels.npy``, or of folders of corruptions.
        corruptions: those that will be read.
        severities: those that will be read.
        data: data module of the clean images; ImageNet-C is found by the names of its files.

    Raises:
        FileNotFoundError: if something is missing.
        ValueError: if they do not belong to the data.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"files={root} is not a folder: name that of CIFAR-10-C, CIFAR-100-C or ImageNet-C")
    if (root / LABELS).is_file() or any(root.glob("*.npy")):
        files: CIFARCFiles | ImageNetCFiles = CIFARCFiles(root, corruptions, severities)
        _check_size(root, data, (3, 32, 32))
    else:
        test_set = getattr(data, "test_set", None)
        names = getattr(test_set, "names", None)
        if names is None:
            raise ValueError(
                f"files={root} holds no {LABELS}, so it should be ImageNet-C, which is found by the names of image files, and "
                "the test set has none: test on ImageNetDataModule or ImageFolderDataModule"
            )
        files = ImageNetCFiles(
            root, corruptions, severities, [os.fsdecode(name) for name in names], test_set.labels, data.image_shape[1]
        )
    return CorruptedFiles(root, files)


def _check_size(root: Path, data: Any, size: tuple[int, int, int]) -> None:
    found = tuple(getattr(data, "image_shape", size))
    if found != size:
        raise ValueError(f"files={root} holds images of {size[1]} x {size[2]} pixels, and the test set {found}: take its own")
