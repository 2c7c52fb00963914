"""Images whose shape and texture are of different classes, from the user's files."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..functional.class_groups import ClassGroups
from .base import ImageDataModule
from .image_files import ENDINGS, ImageFiles, image_names
from .images import Images
from .label_maps import sixteen_classes

# Such as airplane1-bear2.png, or 0001_s5n_s01_0_airplane_00_airplane1-bear2.png.
_NAME = re.compile(r"(?:.*_)?([a-z]+)\d*-([a-z]+)\d*$")


class CueConflictDataModule(ImageDataModule):
    """Cue-conflict images (Geirhos et al. 2019, arXiv 1811.12231): the shape of one of sixteen classes, the texture of another.

    ``data_dir`` holds 1,280 images as their authors give them out, in folders by shape or in one: the name of a file,
    ``airplane1-bear2.png``, says shape and texture. The 80 of which both are of one class are no conflict and left out. The
    label is the class of the shape, so that accuracy is the share of shape decisions; :class:`robust_pl.callbacks.ShapeBias`
    also counts those for the texture, which ``test_textures`` holds.

    A network of ImageNet's 1,000 classes is tested; that of the sixteen counts whose members have the highest mean probability.

    Args:
        data_dir: folder of the images, or what holds it as ``cue-conflict``; default the environment variable ROBUST_PL_DATA,
            else ``./data``.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        image_size: height and width that the network sees; the files have 224.
        resize: length of the shorter side before the cut in the middle.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if a name does not say two of the sixteen classes, all images are without conflict, or one cannot be read.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 224,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, num_workers, val_size=0, augment=False)
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        self.image_shape, self.resize, self.skip_damaged = (3, image_size, image_size), resize, skip_damaged

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Airplane to truck."""
        return list(sixteen_classes())

    @cached_property
    def class_groups(self) -> ClassGroups:  # type: ignore[override]
        return ClassGroups(list(sixteen_classes().values()), "mean")

    @property
    def net_classes(self) -> int:
        return 1000

    @property
    def test_textures(self) -> Tensor:
        """Classes of the textures of the test images, int64 (N,)."""
        files = self.test_set
        assert isinstance(files, ImageFiles)
        return torch.tensor([self._cues(files.path(i))[1] for i in range(len(files))])

    def load_train(self) -> Images:
        raise ValueError("cue-conflict images are a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ImageFiles:
        root = self.data_dir / "cue-conflict"
        root = root if root.is_dir() else self.data_dir
        folders = ["", *sorted(entry.name for entry in root.iterdir() if entry.is_dir())] if root.is_dir() else []
        names = [f"{folder}/{name}".lstrip("/") for folder in folders for name in image_names(root / folder)]
        if not names:
            raise FileNotFoundError(
                f"{root} does not exist or holds no images ({', '.join(ENDINGS)}): set data_dir or ROBUST_PL_DATA to the "
                "folder of the cue-conflict images, such as airplane/airplane1-bear2.png"
            )
        cues = [self._cues(root / name) for name in names]
        kept = [(name, shape) for name, (shape, texture) in zip(names, cues, strict=True) if shape != texture]
        if not kept:
            raise ValueError(f"all {len(names)} images in {root} have shape and texture of one class: there is no conflict")
        labels = torch.tensor([shape for _, shape in kept])
        return ImageFiles(
            root, [name for name, _ in kept], labels, self.image_shape[1], self.resize, skip_damaged=self.skip_damaged
        )

    def _cues(self, path: Path) -> tuple[int, int]:
        """Classes of shape and texture."""
        found = _NAME.match(path.stem)
        named = found.groups() if found else ()
        if not found or any(name not in self.class_names for name in named):
            raise ValueError(
                f"{path} does not say two of the sixteen classes in its name: expected <shape><number>-<texture><number>, such "
                f"as airplane1-bear2.png, of {', '.join(self.class_names)}"
            )
        return self.class_names.index(named[0]), self.class_names.index(named[1])
