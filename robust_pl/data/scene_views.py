"""Views of objects that are rendered in memory: the base of data modules which have scenes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from rich.progress import track
from torch import Tensor

from ..scenes.natural import natural_space
from ..scenes.paint import Numbers, random_picture
from ..scenes.renderer import Renderer
from ..scenes.scene_set import SceneSet
from ..scenes.view_space import Range, ViewSpace
from .augment import shift
from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .hashing import hash_keys, uniform
from .images import ImagesInMemory
from .view_table import ViewTable

_BACKGROUND = 3
_BACKGROUNDS = 100
_SHOWN_FROM = 40_000


class SceneViewsDataModule(ImageDataModule):
    """Images of objects of three parts, ``train``, ``val`` and ``test``, rendered in ``setup`` and kept as 8-bit pixels.

    A subclass tells the objects of a part: :meth:`renderers`, :meth:`object_labels`, :meth:`object_ids` and
    :meth:`object_keys`. Views are the natural ones of VIAT (Ruan et al. 2023, arXiv 2307.10235), see
    :func:`robust_pl.scenes.natural.natural_space`; with ``views="random"`` those to train on fill all of ``view_space``, which
    is the baseline of training on random views. Validation and test images are natural in both cases: accuracy on them is the
    clean accuracy.

    ``train_scenes``, ``val_scenes`` and ``test_scenes`` are the objects themselves, to be rendered from other viewpoints by
    viewpoint attacks and in training; behind them is the same background as behind the images, and one bank of backgrounds
    serves all three. ``train_metadata`` and ``test_metadata`` tell object, pose and caption by index; in the training set the
    validation images come last.

    Args:
        image_size: height and width, in pixels.
        views_per_object: images of each object.
        views: ``natural`` or ``random`` views to train on.
        elevation: of natural views, lowest and highest, in degrees above the horizon.
        view_space: ranges of viewpoints of attacks, of random views, and of distance and shifts of natural ones; None takes
            those of ViewFool.
        background: a grey value in [0, 1], 1 is white; or ``textures``, a bank of 100 procedural pictures, of which each image
            gets one at random, and an attack or a training that renders puts them behind by its own keys.
        object_seed: of the views and the bank.
        data_dir: see :class:`ImageDataModule`, and so all others.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        data_dir: str | None,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        val_size: int | float,
        seed: int,
        augment: bool | list[Augmentation],
        drop_last: bool,
        val_split: ValSplit,
        image_size: int,
        views_per_object: int,
        views: Literal["natural", "random"],
        elevation: Range,
        view_space: ViewSpace | None,
        background: float | Literal["textures"],
        supersampling: int,
        object_seed: int,
    ) -> None:
        counts = {"image_size": image_size, "views_per_object": views_per_object, "supersampling": supersampling}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if object_seed < 0:
            raise ValueError(f"object_seed must be at least 0, not {object_seed}")
        if views not in ("natural", "random"):
            raise ValueError(f"views={views!r} is unknown: choose natural or random")
        if background != "textures" and (isinstance(background, str) or not 0 <= background <= 1):
            raise ValueError(f"background={background!r} must be a grey value in [0, 1], or textures")
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        self.image_shape = (3, image_size, image_size)
        self.views_per_object, self.views, self.elevation = views_per_object, views, (elevation[0], elevation[1])
        self.view_space = view_space or ViewSpace()
        self.natural_space = natural_space(self.view_space, self.elevation)
        self.background, self.supersampling, self.object_seed = background, supersampling, object_seed

    @abstractmethod
    def renderers(self, part: str) -> list[Renderer]:
        """Of each object of a part, images of ``image_shape``; asked for once."""

    @abstractmethod
    def object_ids(self, part: str) -> list[str]:
        """Names of the objects, each in one part alone."""

    @abstractmethod
    def object_labels(self, part: str) -> Tensor:
        """Their classes, int64 (objects,)."""

    @abstractmethod
    def object_keys(self, part: str) -> Tensor:
        """From which their views are drawn, int64 (objects,)."""

    @cached_property
    def train_scenes(self) -> SceneSet:
        """The objects to train on, class by class."""
        return self._scenes("train")

    @cached_property
    def val_scenes(self) -> SceneSet | None:
        """The objects of validation."""
        return self._scenes("val") if self.object_ids("val") else None

    @cached_property
    def test_scenes(self) -> SceneSet:
        """The objects of the test."""
        return self._scenes("test")

    @cached_property
    def train_metadata(self) -> ViewTable:
        """Object, pose and caption of each image of the training set, those of validation included."""
        return self._table(["train", "val"] if self.object_ids("val") else ["train"])

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

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Ascending positions of the images of training and of validation objects, int64 (N,) each."""
        held = torch.arange(len(self.train_set)) >= len(self.object_ids("train")) * self.views_per_object
        return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)

    def load_train(self) -> ImagesInMemory:
        parts = [self._rendered("train", self.train_scenes)]
        if self.val_scenes is not None:
            parts.append(self._rendered("val", self.val_scenes))
        return ImagesInMemory(torch.cat(parts), self.train_metadata.labels, _mirror)

    def load_test(self) -> ImagesInMemory:
        return ImagesInMemory(self._rendered("test", self.test_scenes), self.test_metadata.labels)

    def _scenes(self, part: str) -> SceneSet:
        background = self.background if self.bank is None else self.bank
        assert not isinstance(background, str)
        scenes = SceneSet(self.renderers(part), self.object_labels(part).tolist(), self.object_ids(part), background)
        scenes.check_space(self.view_space)
        return scenes

    def _view_keys(self, part: str) -> Tensor:
        """One for each image of a part, int64 (objects, views)."""
        return hash_keys(self.object_keys(part).view(-1, 1), torch.arange(self.views_per_object))

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
            with torch.no_grad():
                images = scenes.images(which, poses[number], keys[number])
            pixels[number] = images.mul(255).round().to(torch.uint8)
        return pixels.flatten(0, 1)

    def _table(self, parts: Sequence[str]) -> ViewTable:
        ids = [name for part in parts for name in self.object_ids(part)]
        labels = torch.cat([self.object_labels(part) for part in parts])
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
