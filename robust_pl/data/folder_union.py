"""Image folders together with changed or generated copies of them."""

from __future__ import annotations

from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor

from .base import ImageDataModule
from .extra_data import MixedOrder, RealAndExtra
from .image_files import ImageFiles, labelled, subfolders
from .image_folder import ImageFolderDataModule
from .images import Images
from .loaders import TrainOrder


class FolderUnion(ImageDataModule):
    """Training images of class folders and of further folders of the same classes, together.

    For images that were made once, off-line: the EDSR and CAE copies of DeepAugment (Hendrycks et al. 2021, arXiv 2006.16241),
    Stylized ImageNet beside ImageNet (Geirhos et al. 2019, arXiv 1811.12231), images of a diffusion model (Bansal and Grover
    2023, arXiv 2302.02503). This library makes none of them. All are cropped, flipped and augmented alike; labels are those of
    the folders. The ``index`` of a further image is its position behind the real training set, validation samples included, and
    then folder by folder, so that a method can tell where a sample is from.

    Without ``fraction`` an epoch sees each image once, in random order, and is as much longer: compare at equal steps. With it
    every batch holds ``round(fraction * batch_size)`` further images, see :class:`ExtraDataMixture`.

    Splits, validation, test, sizes, workers and augmentation are those of ``data``.

    Args:
        data: the real images.
        more: further folders, each with class folders, as they are or under ``data_dir``. A class may be missing in them.
        fraction: share of further images in each batch, in [0, 1]; None takes the union.
        seed: of splits, order and augmentation; None takes that of ``data``.

    Raises:
        FileNotFoundError: if a folder is missing or holds no images.
        ValueError: if the fraction is out of range, there is no further folder, or one has classes that ``data`` has not.
        TypeError: if ``data`` reads no folders.
    """

    def __init__(
        self, data: ImageFolderDataModule, more: list[str], fraction: float | None = None, seed: int | None = None
    ) -> None:
        if not isinstance(data, ImageFolderDataModule):
            raise TypeError(f"data is a {type(data).__name__}: FolderUnion takes an ImageFolderDataModule")
        super().__init__(
            str(data.data_dir),
            data.batch_size,
            data.eval_batch_size,
            data.num_workers,
            data.val_size,
            data.seed if seed is None else seed,
            data.augment,
            data.drop_last,
            data.val_split,
        )
        if not more:
            raise ValueError("more is empty: name a folder of further images, or take the data module alone")
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction} is a share of further images: choose from [0, 1], or none for the union")
        self.data, self.more, self.fraction = data, more, fraction
        data.seed = self.seed

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return self.data.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.data.image_shape

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _ = self.more_set

    def load_train(self) -> Images:
        return self.data.train_set

    def load_test(self) -> Images:
        return self.data.test_set

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """That of the real images."""
        return self.data.split

    @cached_property
    def more_set(self) -> Images:
        """The further images, folder by folder."""
        return reduce(RealAndExtra, (self._files(folder) for folder in self.more))

    def train_order(self, rank: int, world_size: int, fixed: bool) -> TrainOrder:
        real, first, count = self.split[0], len(self.train_set), len(self.more_set)
        if self.fraction is not None:
            return MixedOrder(real, first, count, self.fraction, self.batch_size, self.seed, rank, world_size, fixed)
        index = torch.cat([real, torch.arange(first, first + count)])
        return TrainOrder(index, self.batch_size, self.seed, rank, world_size, self.drop_last, fixed)

    def train_images(self) -> Images:
        return RealAndExtra(self.train_set, self.more_set)

    def _files(self, folder: str) -> ImageFiles:
        root = Path(folder).expanduser()
        root = root if root.exists() else self.data_dir / root
        labels = {name: label for label, name in enumerate(self.class_names)}
        found = subfolders(root, "name a folder of class folders in more, as it is or under data_dir")
        if unknown := [name for name in found if name not in labels]:
            raise ValueError(f"{root} has classes that the training folder has not: {', '.join(unknown[:5])}")
        data = self.data
        return ImageFiles(root, *labelled(root, labels), data.image_shape[1], data.resize, skip_damaged=data.skip_damaged)
