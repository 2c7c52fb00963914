"""CIFAR-10.1: new test images for networks of CIFAR-10."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from .array_file import map_npy
from .base import ImageDataModule
from .cifar import CIFAR10DataModule
from .images import Images, ImagesInMemory

Version = Literal["v4", "v6"]
_COUNTS = {"v4": 2021, "v6": 2000}
_PLACES = ("", "cifar10.1", "CIFAR-10.1/datasets", "datasets")


class CIFAR101DataModule(ImageDataModule):
    """CIFAR-10.1 (Recht et al. 2018, arXiv 1806.00451): new images, collected as those of CIFAR-10 were.

    Reads ``cifar10.1_v6_data.npy`` and ``cifar10.1_v6_labels.npy`` of its authors' repository, or those of v4.

    Args:
        data_dir: folder of the two files, or what holds it as ``cifar10.1`` or ``CIFAR-10.1/datasets``; default the environment
            variable ROBUST_PL_DATA, else ``./data``.
        version: ``v6``, 2,000 images with as many of each class, or ``v4``, 2,021.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; the images are in memory, so 0 is good.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file does not hold what it should.
    """

    class_names = CIFAR10DataModule.class_names
    image_shape = (3, 32, 32)

    def __init__(
        self, data_dir: str | None = None, version: Version = "v6", eval_batch_size: int = 128, num_workers: int = 0
    ) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, num_workers, val_size=0, augment=False)
        if version not in get_args(Version):
            raise ValueError(f"version={version!r} is unknown: choose one of {', '.join(get_args(Version))}")
        self.version = version

    def load_train(self) -> Images:
        raise ValueError("CIFAR-10.1 is a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ImagesInMemory:
        count = _COUNTS[self.version]
        pixels, labels = self._read("data"), self._read("labels")
        if pixels.shape != (count, 32, 32, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"cifar10.1_{self.version}_data.npy holds {pixels.dtype} {pixels.shape}, not {count} images uint8 (32, 32, 3): "
                "fetch it again"
            )
        if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"cifar10.1_{self.version}_labels.npy does not hold {count} labels from 0 to 9: fetch it again")
        return ImagesInMemory(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))
        )

    def _read(self, what: str) -> np.ndarray:
        name = f"cifar10.1_{self.version}_{what}.npy"
        path = next((found for place in _PLACES if (found := self.data_dir / place / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{self.data_dir / name} does not exist: put {name} of the CIFAR-10.1 repository there, or set data_dir or "
                "ROBUST_PL_DATA to its folder"
            )
        return map_npy(path).read(slice(None))
