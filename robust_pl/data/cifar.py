"""CIFAR-10 and CIFAR-100 from their original Python batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .augment import crop_and_flip
from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .download import download_and_extract
from .images import ImagesInMemory
from .safe_pickle import load_arrays

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    Augmentation pads by 4 black pixels, crops 32 x 32 at random and flips half of the images.

    Args:
        data_dir: the folder that holds ``cifar-10-batches-py``; default the environment variable ROBUST_PL_DATA, else
            ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; the images are in memory, so 0 is good.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples are augmented so; or a list of augmentations instead, see :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        download: fetch the files (163 MiB) from their author's page if they are missing.
        val_split: ``random`` validation samples, drawn by ``seed``, or the ``last`` ones of the training set.

    Raises:
        FileNotFoundError: if the files are missing.
        ValueError: if a file is damaged.
    """

    class_names = _CIFAR10.split()
    image_shape = (3, 32, 32)

    folder = "cifar-10-batches-py"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    md5 = "c58f30108f718f92721af3b95e74349a"
    label_key = b"labels"
    train_files = tuple((f"data_batch_{i}", 10_000) for i in range(1, 6))
    test_files = (("test_batch", 10_000),)

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

    def prepare_data(self) -> None:
        files = (self.data_dir / self.folder / name for name, _ in (*self.train_files, *self.test_files))
        if self.download and not all(file.is_file() for file in files):
            download_and_extract(self.url, self.md5, self.data_dir, self.folder)

    def load_train(self) -> ImagesInMemory:
        return self._load(self.train_files)

    def load_test(self) -> ImagesInMemory:
        return self._load(self.test_files)

    def _load(self, files: tuple[tuple[str, int], ...]) -> ImagesInMemory:
        parts = [self._read(self.data_dir / self.folder / name, count) for name, count in files]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        images = torch.from_numpy(pixels).view(-1, *self.image_shape)
        return ImagesInMemory(images, torch.from_numpy(labels), crop_and_flip)

    def _read(self, path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (count, 3072), channel by channel and row by row, and labels int64 (count,)."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: set data_dir or ROBUST_PL_DATA to the folder that holds {self.folder},"
                " or fetch it with --data.download true"
            )
        content: Any = load_arrays(path)
        content = content if isinstance(content, dict) else {}
        pixels, labels = content.get(b"data"), content.get(self.label_key)
        size = int(np.prod(self.image_shape))
        if not isinstance(pixels, np.ndarray) or pixels.shape != (count, size) or pixels.dtype != np.uint8:
            raise ValueError(f"{path} does not hold {count} images of {size} bytes: delete it and fetch it again")
        if (
            not isinstance(labels, list)
            or len(labels) != count
            or not all(isinstance(label, int) and 0 <= label < self.num_classes for label in labels)
        ):
            raise ValueError(
                f"{path} does not hold {count} labels from 0 to {self.num_classes - 1}: delete it and fetch it again"
            )
        return pixels, np.asarray(labels, dtype=np.int64)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in 100 fine classes.

    Arguments and augmentation are those of CIFAR-10; the folder in ``data_dir`` is ``cifar-100-python``.
    """

    class_names = _CIFAR100.split()

    folder = "cifar-100-python"
    url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    md5 = "eb9058c3a382ffc7106e4002c42a8d85"
    label_key = b"fine_labels"
    train_files = (("train", 50_000),)
    test_files = (("test", 10_000),)
