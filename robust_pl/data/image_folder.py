"""Images in folders, one a class, in the layout of ImageNet."""

from __future__ import annotations

from functools import cached_property

from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .image_files import ImageFiles, labelled, subfolders

_LAYOUT = "set data_dir or ROBUST_PL_DATA to the folder that holds train and val"


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
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples are augmented so; if not, they are read like the others. A list of augmentations,
            see :class:`ImageDataModule`, works on the images so read.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the crop in the middle.
        val_split: ``random`` validation samples, drawn by ``seed``, or the ``last`` ones of ``train/``, which are those of the
            last classes alone.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met; see
            :class:`ImageFiles`.

    Raises:
        FileNotFoundError: if a folder is missing or holds no images.
        ValueError: if an image cannot be read, or ``val`` has a class that ``train`` has not.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        image_size: int = 224,
        resize: int = 256,
        val_split: ValSplit = "random",
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        self.image_shape = (3, image_size, image_size)
        self.resize, self.skip_damaged = resize, skip_damaged

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return subfolders(self.data_dir / "train", _LAYOUT)

    def load_train(self) -> ImageFiles:
        return self._files("train")

    def load_test(self) -> ImageFiles:
        return self._files("val")

    def _files(self, part: str) -> ImageFiles:
        root = self.data_dir / part
        labels = {name: label for label, name in enumerate(self.class_names)}
        if unknown := [name for name in subfolders(root, _LAYOUT) if name not in labels]:
            raise ValueError(f"{root} has classes that the training folder has not: {', '.join(unknown[:5])}")
        return ImageFiles(root, *labelled(root, labels), self.image_shape[1], self.resize, skip_damaged=self.skip_damaged)
