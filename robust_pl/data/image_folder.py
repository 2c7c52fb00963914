"""Images in folders, one a class, in the layout of ImageNet."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .hashing import uniform
from .images import Images

_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TRIES = 10


class ImageFolderDataModule(ImageDataModule):
    """ImageNet's layout: ``train/<class>/*`` and ``val/<class>/*``; the classes are the folders of ``train``, sorted.

    The test set is ``val/``, as in ImageNet, where nothing else has public labels; validation samples are cut from
    ``train/``. Training images are cropped at random (area 0.08 to 1, aspect 3/4 to 4/3), resized and flipped
    (Szegedy et al. 2015); others are resized and cropped in the middle. Greyscale becomes RGB.

    Args:
        data_dir: the folder that holds ``train`` and ``val``; default the environment variable ROBUST_PL_DATA, else
            ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples are augmented so; if not, they are read like the others. A list of augmentations,
            see :class:`ImageDataModule`, works on the images so read.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the crop in the middle.
        val_split: ``random`` validation samples, drawn by ``seed``, or the ``last`` ones of ``train/``, which are those of the
            last classes alone.

    Raises:
        FileNotFoundError: if a folder is missing or holds no images.
        ValueError: if an image cannot be read, or ``val`` has a class that ``train`` has not.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        image_size: int = 224,
        resize: int = 256,
        val_split: ValSplit = "random",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        self.image_shape = (3, image_size, image_size)
        self.resize = resize

    @cached_property
    def class_names(self) -> list[str]:
        return _subfolders(self.data_dir / "train")

    def load_train(self) -> Images:
        return ImageFiles(self.data_dir / "train", self.class_names, self.image_shape[1], self.resize)

    def load_test(self) -> Images:
        return ImageFiles(self.data_dir / "val", self.class_names, self.image_shape[1], self.resize)


class ImageFiles(Images):
    """Image files below ``root/<class>``, decoded when they are read; the arguments are those of the data module."""

    def __init__(self, root: Path, class_names: list[str], image_size: int, resize: int) -> None:
        self.root, self.image_size, self.resize = root, image_size, resize
        unknown = sorted(set(_subfolders(root)) - set(class_names))
        if unknown:
            raise ValueError(f"{root} has classes that the training folder has not: {', '.join(unknown[:5])}")
        names, labels = [], []
        for label, name in enumerate(class_names):
            files = _image_files(root / name)
            names += [os.fsencode(f"{name}/{file}") for file in files]
            labels += [label] * len(files)
        if not names:
            raise FileNotFoundError(f"{root} holds no images ({', '.join(_ENDINGS)}) in its class folders")
        # One array instead of a million strings: counting references would copy those into every worker.
        self.names, self.labels = np.array(names), torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        path = self.root / os.fsdecode(self.names[position])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): remove or replace it") from error
        image = self._centre(image) if key is None else self._random(image, key)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[position])

    def _centre(self, image: Image.Image) -> Image.Image:
        scale = self.resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - self.image_size) // 2, (image.height - self.image_size) // 2
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _random(self, image: Image.Image, key: Tensor) -> Image.Image:
        left, top, width, height = random_box(image.width, image.height, key)
        image = image.resize(
            (self.image_size, self.image_size), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
        )
        flip = uniform(key, 4 * _TRIES) < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def random_box(width: int, height: int, key: Tensor) -> tuple[int, int, int, int]:
    """The part of an image to train on, (left, top, width, height): area 0.08 to 1, aspect 3/4 to 4/3 on a log scale.

    The first of ten tries that fits is taken; if none fits, the largest box in the middle of the nearest aspect.
    """
    area, aspect, x, y = uniform(key, torch.arange(4 * _TRIES)).view(4, _TRIES)
    area = width * height * (0.08 + 0.92 * area)
    aspect = (4 / 3) ** (2 * aspect - 1)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = ((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)).nonzero()
    if len(fits):
        t = int(fits[0])
        w, h = int(widths[t]), int(heights[t])
        return int(x[t] * (width - w + 1)), int(y[t] * (height - h + 1)), w, h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def _subfolders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"{root} does not exist or holds no class folders: set data_dir or ROBUST_PL_DATA to the folder that holds"
            " train and val"
        )
    return names


def _image_files(folder: Path) -> list[str]:
    """Sorted names; none if the folder is missing, since an evaluation set may lack a class."""
    names = (entry.name for entry in os.scandir(folder)) if folder.is_dir() else ()
    return sorted(name for name in names if name.lower().endswith(_ENDINGS))
