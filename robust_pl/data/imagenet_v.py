"""ImageNet-V and ImageNet-V+: renderings of objects of ImageNet's classes from adversarial viewpoints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from .base import ImageDataModule
from .image_files import undamaged
from .images import Images
from .label_maps import imagenet_wnids
from .view_files import ViewFiles, image_names


class ImageNetVDataModule(ImageDataModule):
    """ImageNet-V (Dong et al. 2022, arXiv 2210.03895) and ImageNet-V+ (Ruan et al. 2023, arXiv 2307.10235) as test sets.

    10,000 images that ViewFool found for 100 objects, and 100,000 that GMVFool found for 1,000; ``data_dir`` holds the folders
    of classes or objects as they were unpacked. A network of ImageNet's 1,000 classes is tested, with its usual crop: there
    is nothing to train on. Accuracy is that over all images, as in the papers' tables.

    A folder's class is told by its name where that is a WordNet number such as ``n02687172``, or a class number from 0 to 999.
    Others are looked up in ``label_map``, a text file: a line ``hotdog 934`` or ``hotdog n07697537`` for each folder; or one
    class number a line for the folders in sorted order, which is the form of the ``label_map.txt`` in VIAT's repository.

    Args:
        data_dir: folder of the class folders; default the environment variable ROBUST_PL_DATA, else ``./data``.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the cut in the middle.
        label_map: file that gives the classes of folders which do not say it; below ``data_dir``, or any place.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met;
            costs one more pass over the files.

    Raises:
        FileNotFoundError: if a folder or the file is missing.
        ValueError: if a folder's class cannot be told, or an image cannot be read.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 256,
        label_map: str | None = None,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, num_workers, val_size=0, augment=False)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        self.image_shape, self.resize, self.label_map = (3, image_size, image_size), resize, label_map
        self.skip_damaged = skip_damaged

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """WordNet numbers of ImageNet's 1,000 classes, in the order of a network's logits."""
        return list(imagenet_wnids())

    @property
    def num_classes(self) -> int:
        return 1000

    def load_train(self) -> Images:
        raise ValueError("ImageNet-V is a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ViewFiles:
        folders = sorted(path.name for path in self.data_dir.iterdir() if path.is_dir()) if self.data_dir.is_dir() else []
        names, labels = [], []
        for folder, label in zip(folders, self._labels(folders), strict=True):
            found = _images_below(self.data_dir, folder)
            names += found
            labels += [label] * len(found)
        if not names:
            raise FileNotFoundError(
                f"{self.data_dir} does not exist or holds no images in class folders: set data_dir or ROBUST_PL_DATA to the "
                "unpacked ImageNet-V"
            )
        if self.skip_damaged:
            good = undamaged(self.data_dir, [self.data_dir / name for name in names]).nonzero()[0]
            names, labels = [names[i] for i in good], [labels[i] for i in good]
        return ViewFiles(self.data_dir, names, torch.tensor(labels), self.image_shape[1], self.resize)

    def _labels(self, folders: list[str]) -> list[int]:
        """Class numbers of folders."""
        given = {} if self.label_map is None else self._read_map(folders)
        labels = {folder: self._number(given.get(folder, folder)) for folder in folders}
        if unknown := [folder for folder, label in labels.items() if label is None]:
            raise ValueError(
                f"{len(unknown)} folders of {self.data_dir} are no class of ImageNet, such as {unknown[0]!r}: give label_map, "
                "a file with lines such as 'hotdog 934'"
            )
        return [label for label in labels.values() if label is not None]

    def _number(self, name: str) -> int | None:
        if name.isascii() and name.isdecimal():
            return int(name) if int(name) < 1000 else None
        return self.class_names.index(name) if name in self.class_names else None

    def _read_map(self, folders: list[str]) -> dict[str, str]:
        path = self.data_dir / str(self.label_map)
        path = path if path.is_file() else Path(str(self.label_map))
        if not path.is_file():
            raise FileNotFoundError(f"label_map={self.label_map} does not exist: give the file with the class of each folder")
        lines = [line.replace(",", " ").split() for line in path.read_text("utf-8").splitlines() if line.strip()]
        if all(len(line) == 1 for line in lines):
            if len(lines) != len(folders):
                raise ValueError(f"{path} has {len(lines)} classes for {len(folders)} folders: give one for each, in order")
            return {folder: line[0] for folder, line in zip(folders, lines, strict=True)}
        if bad := [line for line in lines if len(line) != 2 or self._number(line[1]) is None]:
            raise ValueError(f"{path} has the line {' '.join(bad[0])!r}: each must be a folder and its class or WordNet number")
        return dict(lines)


def _images_below(root: Path, folder: str) -> list[str]:
    """Names below the root of the images in a folder and in the folders inside."""
    found = [f"{folder}/{name}" for name in image_names(root / folder)]
    for inner in sorted(path.name for path in (root / folder).iterdir() if path.is_dir()):
        found += _images_below(root, f"{folder}/{inner}")
    return found
