"""What test sets of ImageNet's classes have in common: folders, labels, and which logits of a network count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from .base import ImageDataModule
from .image_files import ImageFiles, labelled, subfolders
from .images import Images


class ImageNetSet(ImageDataModule, ABC):
    """Base of test sets for networks of ImageNet's 1,000 classes: images in one folder a class, and nothing to train on.

    Images are read as ImageNet's are: shorter side of ``resize`` pixels, cut to ``image_size`` in the middle. A subclass says
    which folders there must be, by ``labels``; and by ``class_names`` and ``class_groups`` what the labels mean where they are
    not ImageNet's own.

    Args:
        data_dir: folder of the class folders, or what holds it under its usual name (``usual``); default the environment
            variable ROBUST_PL_DATA, else ``./data``.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the cut in the middle.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met;
            costs one more pass over the files.

    Raises:
        FileNotFoundError: if there are no class folders or images.
        ValueError: if the folders are not the set's classes, or an image cannot be read.
    """

    title: str
    """Name of the set, in sentences."""
    usual: tuple[str, ...] = ()
    """Where the class folders are below ``data_dir`` after unpacking."""
    border = 0

    def __init__(
        self,
        data_dir: str | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 256,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, num_workers, val_size=0, augment=False)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        self.image_shape, self.resize, self.skip_damaged = (3, image_size, image_size), resize, skip_damaged

    @property
    @abstractmethod
    def labels(self) -> dict[str, int]:
        """Folder -> label, of all folders that must be there."""

    @property
    def net_classes(self) -> int:
        return 1000

    @property
    def root(self) -> Path:
        """The folder that holds the class folders."""
        below = (self.data_dir / name for name in self.usual)
        return next((path for path in below if path.is_dir()), self.data_dir)

    def load_train(self) -> Images:
        raise ValueError(f"{self.title} is a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ImageFiles:
        check_folders(self.root, self.labels, self.title, self._remedy(), self._unknown(self._folders()))
        names, labels = labelled(self.root, self.labels)
        return ImageFiles(
            self.root, names, labels, self.image_shape[1], self.resize, self.border, skip_damaged=self.skip_damaged
        )

    def _remedy(self) -> str:
        where = f" or what holds {' or '.join(self.usual)}" if self.usual else ""
        return f"set data_dir or ROBUST_PL_DATA to the folder of class folders of {self.title}{where}"

    def _folders(self) -> list[str]:
        return subfolders(self.root, self._remedy())

    def _unknown(self, found: list[str]) -> list[str]:
        """Folders that should not be there."""
        return [name for name in found if name not in self.labels]


def check_folders(root: Path, wanted: Collection[str], title: str, remedy: str, unknown: Collection[str] | None = None) -> None:
    """Refuse class folders that are not those of a set.

    Args:
        root: that holds them.
        wanted: names that must be there.
        title: of the set, for the sentence.
        remedy: what to do.
        unknown: those that must not be there; None takes all that are not wanted.

    Raises:
        FileNotFoundError: if there is no folder.
        ValueError: if one is missing or unknown.
    """
    found = set(subfolders(root, remedy))
    if unknown is None:
        unknown = sorted(found - set(wanted))
    missing = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(
            f"{root} has {len(unknown)} folders that are no classes of {title}, such as {min(unknown)!r}: {remedy}"
        )
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} of the {len(wanted)} class folders of {title}, such as {missing[0]!r}: {remedy}"
        )
