"""Photographs or renderings of objects from many sides, split by object."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .object_folders import Shot, pose_beside, read_classes, shots_in_folders, shots_of_metadata
from .object_split import Share, check_share, split_objects
from .view_files import ViewFiles
from .view_table import ViewTable


class MultiViewDataModule(ImageDataModule):
    """Images of many objects, many of each, of which whole objects are held out for validation and test.

    The images are found as IM3D (Ruan et al. 2023, arXiv 2307.10235), MIRO (Kanezaki et al. 2018, arXiv 1603.06208), MVImgNet
    and renderings of Objaverse have them, see :func:`robust_pl.data.object_folders.shots_in_folders`, or in a list like that of
    MVCap (Ruan et al. 2024, arXiv 2404.12139), see :func:`robust_pl.data.object_folders.shots_of_metadata`. A network that is
    tested on objects it was trained on can answer by their texture; so no object is in two parts.

    ``train_metadata`` and ``test_metadata`` tell object, pose and caption of each image by its ``index``, see
    :class:`ViewTable`; the training set holds the validation images, too.

    Images are resized and cut in the middle; with ``augment`` training images are cut at random and mirrored half of the time.
    Transparent ones show the background. Greyscale becomes RGB.

    Args:
        data_dir: the folder of the objects; default the environment variable ROBUST_PL_DATA, else ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        seed: of the validation objects, the order and the augmentation.
        augment: whether training images are cut at random and mirrored; or a list of augmentations, see
            :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the cut; None takes ``image_size``.
        val_objects: objects of each class for validation, as a fraction or a number; 0 for none.
        test_objects: objects of each class for the test.
        held_out: which those are: ``random`` ones, of the test the same for every seed; or the ``last`` ones of each class by
            their names, the test's behind the validation's. The authors of VIAT test on the last of ten.
        metadata: a list of images like MVCap's, below ``data_dir``; None looks for folders.
        classes: a file that says which class an object is of, JSON or a table, below ``data_dir``; ``objects`` makes each
            object a class of its own, for a training that uses captions and objects alone. None takes the names of folders.
        poses: read poses too, from ``transforms*.json`` or, in renderings of Objaverse, ``<view>.npy``.
        background: grey value in [0, 1] behind transparent images.
        skip_missing: leave out images that a list names and that are not there, instead of refusing.

    Raises:
        FileNotFoundError: if there are no images, or one that is listed is missing.
        ValueError: if an argument is out of range, an object has no class, a class too few objects, or an image no pose where
            ``poses`` asks for it.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        image_size: int = 224,
        resize: int | None = None,
        val_objects: Share = 0.1,
        test_objects: Share = 0.2,
        held_out: ValSplit = "random",
        metadata: str | None = None,
        classes: str | Literal["objects"] | None = None,
        poses: bool = False,
        background: float = 1.0,
        skip_missing: bool = False,
    ) -> None:
        check_share("val_objects", val_objects)
        check_share("test_objects", test_objects)
        resize = image_size if resize is None else resize
        if not 1 <= image_size <= resize:
            raise ValueError(f"image_size={image_size} must be at least 1 and at most resize={resize}")
        if not 0 <= background <= 1:
            raise ValueError(f"background={background} is a grey value: choose from [0, 1]")
        if metadata is not None and classes is None:
            raise ValueError(
                "a list of metadata gives no classes: set classes to a file that does, or to objects, which makes each object "
                "a class of its own"
            )
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_objects, seed, augment, drop_last, held_out)
        self.image_shape, self.resize = (3, image_size, image_size), resize
        self.val_objects, self.test_objects, self.held_out = val_objects, test_objects, held_out
        self.metadata, self.classes, self.poses, self.background = metadata, classes, poses, background
        self.skip_missing = skip_missing

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return sorted({shot.class_name for shot in self._shots})

    @cached_property
    def train_metadata(self) -> ViewTable:
        """Object, pose and caption of each image of the training set, those of validation included."""
        return self._table([*self._objects[0], *self._objects[1]])

    @cached_property
    def test_metadata(self) -> ViewTable:
        """Object, pose and caption of each test image."""
        return self._table(self._objects[2])

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Ascending positions of the images of training and of validation objects, int64 (N,) each."""
        _ = self.train_set
        held = self.train_metadata.object >= len(self._objects[0])
        return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)

    def load_train(self) -> ViewFiles:
        return self._files(self.train_metadata)

    def load_test(self) -> ViewFiles:
        if not self._objects[2]:
            raise ValueError(f"test_objects={self.test_objects} leaves no object to test on: raise it")
        return self._files(self.test_metadata)

    @cached_property
    def _shots(self) -> list[Shot]:
        table = self.classes not in (None, "objects")
        of_objects = read_classes(self.data_dir / str(self.classes)) if table else None
        if self.metadata is not None:
            shots = shots_of_metadata(self.data_dir / self.metadata, of_objects)
            return [shot for shot in shots if Path(self.data_dir, shot.name).is_file()] if self.skip_missing else shots
        shots = shots_in_folders(self.data_dir, of_objects, self.skip_missing)
        return shots if self.classes != "objects" else [shot._replace(class_name=shot.object_id) for shot in shots]

    @cached_property
    def _shots_of_object(self) -> dict[str, list[Shot]]:
        found: dict[str, list[Shot]] = {}
        for shot in self._shots:
            found.setdefault(shot.object_id, []).append(shot)
        return found

    @cached_property
    def _objects(self) -> tuple[list[str], list[str], list[str]]:
        """Names of the objects of training, validation and test, class by class."""
        groups: dict[str, list[str]] = {name: [] for name in self.class_names}
        for name, shots in self._shots_of_object.items():
            groups[shots[0].class_name].append(name)
        if self.classes == "objects":  # there is no class with several
            groups = {"all": list(self._shots_of_object)}
        return split_objects(groups, self.val_objects, self.test_objects, self.held_out, self.seed)

    def _files(self, table: ViewTable) -> ViewFiles:
        return ViewFiles(self.data_dir, table.names, table.labels, self.image_shape[1], self.resize, self.background)

    def _table(self, objects: list[str]) -> ViewTable:
        shots = [shot for name in objects for shot in self._shots_of_object[name]]
        numbers = {name: i for i, name in enumerate(objects)}
        labels = {name: i for i, name in enumerate(self.class_names)}
        return ViewTable(
            objects,
            torch.tensor([labels[self._shots_of_object[name][0].class_name] for name in objects], dtype=torch.int64),
            torch.tensor([numbers[shot.object_id] for shot in shots], dtype=torch.int64),
            [shot.name for shot in shots],
            self._poses(shots) if self.poses else None,
            [shot.caption or "" for shot in shots] if shots and shots[0].caption is not None else None,
        )

    def _poses(self, shots: list[Shot]) -> Tensor:
        """Camera-to-world (N, 4, 4)."""
        found = [shot.pose if shot.pose is not None else pose_beside(Path(self.data_dir, shot.name)) for shot in shots]
        if without := [shot.name for shot, pose in zip(shots, found, strict=True) if pose is None]:
            raise ValueError(
                f"{len(without)} of {len(shots)} images have no pose, such as {without[0]}: add transforms.json or <view>.npy "
                "beside them, or set poses to false"
            )
        return torch.stack([pose for pose in found if pose is not None]).float()
