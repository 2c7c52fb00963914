"""Tiny ImageNet from its original folders."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from .augment import crop_and_flip
from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .download import download_and_extract
from .images import ImagesInMemory

_SHOWN_FROM = 20_000


class TinyImageNetDataModule(ImageDataModule):
    """Tiny ImageNet (Le and Yang 2015): 100,000 training images of 64 x 64 pixels, 500 of each of 200 classes of ImageNet.

    The test set is the official validation set, 10,000 images, since the labels of the official test set are not public;
    validation samples are cut from the training set. Classes are numbered in the order of their WordNet numbers, as
    ``ImageFolder`` of torchvision has them, and not in that of ``wnids.txt``. Greyscale becomes RGB. Augmentation pads by 4
    black pixels, crops 64 x 64 at random and flips half of the images.

    The images are decoded once, when a stage first needs them, and stay in memory as 8-bit pixels: 1.23 GB for the training
    set and 0.12 GB for the test set, in each process. That takes as long as one epoch that reads files: 0.5 ms an image, about
    a minute, on one of two busy cores.

    Args:
        data_dir: the folder that holds ``tiny-imagenet-200``; default the environment variable ROBUST_PL_DATA, else
            ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; the images are in memory, so 0 is good.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples are augmented so; or a list of augmentations instead, see :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        download: fetch the files (237 MiB, without encryption, but checked) from their author's page if they are missing.
        val_split: ``random`` validation samples, drawn by ``seed``, or the ``last`` ones of the training set, which are those
            of the last classes alone.

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if a file is damaged, or there are more or fewer than there should be.
    """

    image_shape = (3, 64, 64)

    folder = "tiny-imagenet-200"
    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5 = "90528d7ca1a48142e341f4ef8d21d0de"
    classes, train_images_a_class, test_images = 200, 500, 10_000

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        download: bool = False,
        val_split: ValSplit = "random",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        self.download = download

    @property
    def root(self) -> Path:
        """Where the files are."""
        return self.data_dir / self.folder

    @property
    def num_classes(self) -> int:
        return self.classes  # before there are files that could be counted

    @cached_property
    def wnids(self) -> list[str]:
        """WordNet numbers of the classes, ``n01443537`` and so on."""
        found = sorted(set(self._lines("wnids.txt")) - {""})
        if len(found) != self.classes:
            raise ValueError(
                f"{self.root / 'wnids.txt'} names {len(found)} classes, not {self.classes}: unpack the archive again"
            )
        return found

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The first word for each class; where that is one of two classes, with its WordNet number."""
        words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in self.wnids]
        count = Counter(names)
        return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, self.wnids, strict=True)]

    def prepare_data(self) -> None:
        parts = (self.root / name for name in ("wnids.txt", "words.txt", "train", "val/val_annotations.txt", "val/images"))
        if self.download and not all(part.exists() for part in parts):
            download_and_extract(self.url, self.md5, self.data_dir, self.folder)

    def load_train(self) -> ImagesInMemory:
        paths: list[Path] = []
        for wnid in self.wnids:
            folder = self.root / "train" / wnid / "images"
            found = sorted(folder.glob("*.JPEG"))
            if len(found) != self.train_images_a_class:
                raise (ValueError if found else FileNotFoundError)(
                    f"{folder} holds {len(found)} JPEG images, not {self.train_images_a_class}: unpack the archive again"
                )
            paths += found
        return self._decode(paths, [label for label in range(self.classes) for _ in range(self.train_images_a_class)])

    def load_test(self) -> ImagesInMemory:
        name = "val/val_annotations.txt"
        numbers, labels = {wnid: label for label, wnid in enumerate(self.wnids)}, {}
        for place, line in enumerate(self._lines(name), 1):
            image, wnid = (*line.split("\t"), "", "")[:2]
            if line and wnid not in numbers:
                raise ValueError(
                    f"{self.root / name}, line {place}: the class {wnid!r} of {image!r} is none of wnids.txt: unpack the "
                    "archive again"
                )
            if line:
                labels[image] = numbers[wnid]
        if len(labels) != self.test_images:
            raise ValueError(
                f"{self.root / name} is about {len(labels)} images, not {self.test_images}: unpack the archive again"
            )
        return self._decode([self.root / "val" / "images" / image for image in labels], list(labels.values()))

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        try:
            return [line.strip() for line in path.read_text("utf-8").splitlines()]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} does not exist: set data_dir or ROBUST_PL_DATA to the folder that holds {self.folder} as it was "
                "published, or fetch it with --data.download true"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): unpack the archive again") from error

    def _decode(self, paths: list[Path], labels: list[int]) -> ImagesInMemory:
        pixels = np.empty((len(paths), *self.image_shape), np.uint8)
        quiet = len(paths) < _SHOWN_FROM
        for place, path in enumerate(track(paths, "Decoding Tiny ImageNet", transient=True, disable=quiet)):
            pixels[place] = self._image(path).transpose(2, 0, 1)
        return ImagesInMemory(torch.from_numpy(pixels), torch.tensor(labels), crop_and_flip)

    def _image(self, path: Path) -> np.ndarray:
        """Pixels uint8 (64, 64, 3)."""
        try:
            with Image.open(path) as file:
                image = np.asarray(file.convert("RGB"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist: unpack the archive again") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): unpack the archive again") from error
        if image.shape[:2] != self.image_shape[1:]:
            raise ValueError(f"{path} is an image of {image.shape[1]} x {image.shape[0]} pixels, not 64 x 64: unpack it again")
        return image
