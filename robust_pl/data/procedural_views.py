"""Rendered views of procedural solids: objects in ten classes that need no download and can be looked at from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from rich.progress import track
from torch import Tensor

from ..scenes.natural import USUAL_ELEVATION, natural_space
from ..scenes.paint import Numbers, random_picture
from ..scenes.rasterizer import MeshRasterizer
from ..scenes.scene_set import SceneSet
from ..scenes.solids import SOLIDS, make_solid
from ..scenes.view_space import Range, ViewSpace
from .augment import shift
from .augmentations import Augmentation
from .base import ImageDataModule
from .hashing import hash_keys, uniform
from .images import ImagesInMemory
from .view_table import ViewTable

Part = Literal["train", "val", "test"]
_PARTS: tuple[str, ...] = get_args(Part)
_OBJECT, _VIEW, _BACKGROUND = 1, 2, 3
_BACKGROUNDS = 100
_SHOWN_FROM = 40_000


class ProceduralViewsDataModule(ImageDataModule):
    """Views of random objects of the ten classes of :data:`robust_pl.scenes.SOLIDS`, split by object.

    Every class has ``train_objects``, ``val_objects`` and ``test_objects`` objects, each with a shape and a texture of its own,
    and every object ``views_per_object`` images. They are rendered once, in ``setup``, and kept as 8-bit pixels: 0.17 ms an
    image at 48 pixels on one core of a server CPU, so that the default 5,500 images take about a second and are not kept on
    disk. Views are the natural ones of VIAT (Ruan et al. 2023, arXiv 2307.10235), see
    :func:`robust_pl.scenes.natural.natural_space`; with ``views="random"`` those to train on fill all of ``view_space``, which
    is the baseline of training on random views. Validation and test images are natural in both cases: accuracy on them is the
    clean accuracy.

    ``train_scenes``, ``val_scenes`` and ``test_scenes`` are the objects themselves, to be rendered from other viewpoints by
    viewpoint attacks and in training; behind them is the same background as behind the images, and one bank of backgrounds
    serves all three. ``train_metadata`` and ``test_metadata`` tell object, pose and caption by index; in the training set the
    validation images come last.

    Objects and views are a function of ``object_seed``, class, part and number alone: more training objects leave the test as
    it is, and ``seed`` changes only the order of training.

    Args:
        data_dir: unused; everything is made.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; the images are in memory, so 0 is good.
        seed: of the order and the augmentation.
        augment: whether training images are mirrored half of the time; or a list of augmentations instead, see
            :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width, in pixels.
        train_objects: of each class.
        val_objects: of each class; 0 for no validation.
        test_objects: of each class.
        views_per_object: images of each object.
        views: ``natural`` or ``random`` views to train on.
        elevation: of natural views, lowest and highest, in degrees above the horizon.
        view_space: ranges of viewpoints of attacks, of random views, and of distance and shifts of natural ones; None takes
            those of ViewFool.
        background: a grey value in [0, 1], 1 is white; or ``textures``, a bank of 100 procedural pictures, of which each image
            gets one at random, and an attack or a training that renders puts them behind by its own keys.
        supersampling: s renders s * s samples a pixel, which softens edges; costs about s * s.
        object_seed: another number is another data set.

    Raises:
        ValueError: if an argument is out of range, or a camera could stand inside an object.
    """

    class_names = list(SOLIDS)  # noqa: RUF012

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool | list[Augmentation] = False,
        drop_last: bool = True,
        image_size: int = 48,
        train_objects: int = 8,
        val_objects: int = 1,
        test_objects: int = 2,
        views_per_object: int = 50,
        views: Literal["natural", "random"] = "natural",
        elevation: Range = USUAL_ELEVATION,
        view_space: ViewSpace | None = None,
        background: float | Literal["textures"] = 1.0,
        supersampling: int = 1,
        object_seed: int = 0,
    ) -> None:
        counts = {"image_size": image_size, "train_objects": train_objects, "test_objects": test_objects}
        counts |= {"views_per_object": views_per_object, "supersampling": supersampling}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, value in (("val_objects", val_objects), ("object_seed", object_seed)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if views not in ("natural", "random"):
            raise ValueError(f"views={views!r} is unknown: choose natural or random")
        if background != "textures" and (isinstance(background, str) or not 0 <= background <= 1):
            raise ValueError(f"background={background!r} must be a grey value in [0, 1], or textures")
        n_val = len(SOLIDS) * val_objects * views_per_object
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, n_val, seed, augment, drop_last, "last")
        self.image_shape = (3, image_size, image_size)
        self.objects = dict(zip(_PARTS, (train_objects, val_objects, test_objects), strict=True))
        self.views_per_object, self.views, self.elevation = views_per_object, views, (elevation[0], elevation[1])
        self.view_space = view_space or ViewSpace()
        self.natural_space = natural_space(self.view_space, self.elevation)
        self.view_space.check_outside(1.0, "an object")
        self.background, self.supersampling, self.object_seed = background, supersampling, object_seed

    @cached_property
    def train_scenes(self) -> SceneSet:
        """The objects to train on, class by class."""
        return self._scenes("train")

    @cached_property
    def val_scenes(self) -> SceneSet | None:
        """The objects of validation."""
        return self._scenes("val") if self.objects["val"] else None

    @cached_property
    def test_scenes(self) -> SceneSet:
        """The objects of the test."""
        return self._scenes("test")

    @cached_property
    def train_metadata(self) -> ViewTable:
        """Object, pose and caption of each image of the training set, those of validation included."""
        return self._table(["train", "val"] if self.objects["val"] else ["train"])

    @cached_property
    def test_metadata(self) -> ViewTable:
        """Object, pose and caption of each test image."""
        return self._table(["test"])

    @cached_property
    def bank(self) -> Tensor | None:
        """Pictures of which one stands behind each view, (100, 3, H, W) in [0, 1]; None for a grey background."""
        if self.background != "textures":
            return None
        pictures = [random_picture(Numbers(self.object_seed, _BACKGROUND, i)) for i in range(_BACKGROUNDS)]
        return torch.nn.functional.interpolate(
            torch.stack(pictures).permute(0, 3, 1, 2), self.image_shape[1:], mode="bilinear", antialias=True
        ).clamp(0.0, 1.0)

    def load_train(self) -> ImagesInMemory:
        parts = [self._rendered("train", self.train_scenes)]
        if self.val_scenes is not None:
            parts.append(self._rendered("val", self.val_scenes))
        return ImagesInMemory(torch.cat(parts), self.train_metadata.labels, _mirror)

    def load_test(self) -> ImagesInMemory:
        return ImagesInMemory(self._rendered("test", self.test_scenes), self.test_metadata.labels)

    def _keys(self, purpose: int, part: str) -> Tensor:
        """One for each object of a part, int64 (classes, objects)."""
        numbers = torch.arange(self.objects[part])
        return hash_keys(self.object_seed, purpose, _PARTS.index(part), torch.arange(self.num_classes).unsqueeze(1), numbers)

    def _scenes(self, part: str) -> SceneSet:
        size = self.image_shape[1:]
        made = [
            MeshRasterizer(make_solid(label, key), size, supersampling=self.supersampling)
            for label, keys in enumerate(self._keys(_OBJECT, part).tolist())
            for key in keys
        ]
        background = self.background if self.bank is None else self.bank
        assert not isinstance(background, str)
        return SceneSet(made, self._labels(part).tolist(), self._ids(part), background)

    def _labels(self, part: str) -> Tensor:
        return torch.arange(self.num_classes).repeat_interleave(self.objects[part])

    def _ids(self, part: str) -> list[str]:
        return [f"{name}_{part}_{i}" for name in self.class_names for i in range(self.objects[part])]

    def _view_keys(self, part: str) -> Tensor:
        """One for each image of a part, int64 (objects, views)."""
        return hash_keys(self._keys(_VIEW, part).view(-1, 1), torch.arange(self.views_per_object))

    def _poses(self, part: str) -> Tensor:
        """(objects, views, 4, 4)."""
        space = self.view_space if part == "train" and self.views == "random" else self.natural_space
        keys = self._view_keys(part).unsqueeze(2)
        return space.to_matrix(space.uniform(uniform(keys, torch.arange(space.dim)))).float()

    def _rendered(self, part: str, scenes: SceneSet) -> Tensor:
        """Pixels uint8 (objects * views, 3, H, W)."""
        poses, keys = self._poses(part), hash_keys(self._view_keys(part), _BACKGROUND)
        pixels = torch.empty(*poses.shape[:2], *self.image_shape, dtype=torch.uint8)
        quiet = len(scenes) * self.views_per_object * self.supersampling**2 < _SHOWN_FROM
        for number in track(range(len(scenes)), f"Rendering {part} views", transient=True, disable=quiet):
            which = torch.full((self.views_per_object,), number)
            pixels[number] = scenes.images(which, poses[number], keys[number]).mul(255).round().to(torch.uint8)
        return pixels.flatten(0, 1)

    def _table(self, parts: Sequence[str]) -> ViewTable:
        ids = [name for part in parts for name in self._ids(part)]
        labels = torch.cat([self._labels(part) for part in parts])
        count = self.views_per_object
        return ViewTable(
            ids,
            labels,
            torch.arange(len(ids)).repeat_interleave(count),
            [f"{name}_{view}" for name in ids for view in range(count)],
            torch.cat([self._poses(part).flatten(0, 1) for part in parts]),
            [f"a picture of a {self.class_names[label]}" for label in labels.tolist() for _ in range(count)],
        )


def _mirror(x: Tensor, keys: Tensor) -> Tensor:
    """Left and right exchanged in half of the images (B, C, H, W)."""
    return shift(x, keys, pixels=0, flip=True)
