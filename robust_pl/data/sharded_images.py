"""Sets as large as ImageNet, read or streamed from shards."""

from __future__ import annotations

from functools import cached_property

import torch

from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .shard_files import ShardedImages, ShardIndex
from .shard_order import ShardOrder


class ShardedImagesDataModule(ImageDataModule):
    """Training and test images in shards, which ``python -m robust_pl.data.write_shards`` makes of image folders.

    A shard is a file of many pictures: one that is read from its beginning to its end is far faster than single files on a
    network or a spinning disk, and can be fetched whole from an address. Images are cut and augmented as by
    :class:`ImageFolderDataModule`, and the test set is the same, number for number. Training samples were shuffled when they
    were written, and their ``index`` is their position in the shards; each epoch shuffles again, see
    :class:`robust_pl.data.shard_order.ShardOrder`. Runs resume in the middle of an epoch, with any number of workers.

    Args:
        data_dir: the folder that holds the shards, or is to hold what is fetched; default the environment variable
            ROBUST_PL_DATA, else ``./data``.
        url: address of a folder of shards. One that ``data_dir`` lacks is fetched when a sample of it is first read, once for
            all processes of a machine, and stays, so that the folder grows to the size of the set. Needs ``robust_pl[stream]``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples are cut at random and mirrored; or a list of augmentations, see
            :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the crop in the middle.
        mixed: shards among which training samples are mixed at a time.
        val_split: the ``last`` samples, which are random ones in few shards; or ``random`` ones in all of them, drawn by
            ``seed``.

    Raises:
        FileNotFoundError: if an index or a shard is missing.
        ImportError: if shards are to be fetched and webdataset is not installed.
        ValueError: if an argument is out of range, or a shard is damaged or cannot be fetched, or training and test
            set have unlike classes.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        url: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        image_size: int = 224,
        resize: int = 256,
        mixed: int = 16,
        val_split: ValSplit = "last",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        if mixed < 1:
            raise ValueError(f"mixed={mixed} is a number of shards: choose 1 or more")
        self.image_shape = (3, image_size, image_size)
        self.url, self.resize, self.mixed = url, resize, mixed

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        there = [part for part in ("train", "val") if self.url is None and (self.data_dir / f"{part}.npz").is_file()]
        part = there[0] if there else "train"
        return ShardIndex.load(self.data_dir, part, self.url).classes.tolist()

    def load_train(self) -> ShardedImages:
        return self._images("train")

    def load_test(self) -> ShardedImages:
        return self._images("val")

    def train_order(self, rank: int, world_size: int, fixed: bool) -> ShardOrder:
        first = torch.from_numpy(self.train_set.index.first)
        sizes = self.mixed, self.batch_size, self.seed
        return ShardOrder(self.split[0], first, *sizes, rank, world_size, self.drop_last, fixed)

    def _images(self, part: str) -> ShardedImages:
        images = ShardedImages(self.data_dir, part, self.image_shape[1], self.resize, self.url)
        if (classes := images.index.classes.tolist()) != self.class_names:  # labels would mean other classes
            raise ValueError(
                f"{self.data_dir / part}.npz has {len(classes)} classes, not the {len(self.class_names)} of train.npz, or "
                "other ones: write both by one call of python -m robust_pl.data.write_shards"
            )
        return images
