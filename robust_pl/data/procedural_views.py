"""Rendered views of procedural solids: objects in ten classes that need no download and can be looked at from anywhere."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..scenes.natural import USUAL_ELEVATION
from ..scenes.rasterizer import MeshRasterizer
from ..scenes.renderer import Renderer
from ..scenes.solids import SOLIDS, make_solid
from ..scenes.view_space import Range, ViewSpace
from .augmentations import Augmentation
from .hashing import hash_keys
from .scene_views import SceneViewsDataModule

Part = Literal["train", "val", "test"]
_PARTS: tuple[str, ...] = get_args(Part)
_OBJECT, _VIEW = 1, 2


class ProceduralViewsDataModule(SceneViewsDataModule):
    """Views of random objects of the ten classes of :data:`robust_pl.scenes.SOLIDS`, split by object.

    Every class has ``train_objects``, ``val_objects`` and ``test_objects`` objects, each with a shape and a texture of its own,
    and every object ``views_per_object`` images. They are rendered once, in ``setup``, and kept as 8-bit pixels: 0.17 ms an
    image at 48 pixels on one core of a server CPU, so that the default 5,500 images take about a second and are not kept on
    disk. What views, scenes and metadata are is told in :class:`SceneViewsDataModule`.

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
        for name, value in (("train_objects", train_objects), ("test_objects", test_objects)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if val_objects < 0:
            raise ValueError(f"val_objects must be at least 0, not {val_objects}")
        super().__init__(
            data_dir,
            batch_size,
            eval_batch_size,
            num_workers,
            max(0, len(SOLIDS) * val_objects * views_per_object),
            seed,
            augment,
            drop_last,
            "last",
            image_size,
            views_per_object,
            views,
            elevation,
            view_space,
            background,
            supersampling,
            object_seed,
        )
        self.objects = dict(zip(_PARTS, (train_objects, val_objects, test_objects), strict=True))
        self.view_space.check_outside(1.0, "an object")

    def renderers(self, part: str) -> list[Renderer]:
        size = self.image_shape[1:]
        return [
            MeshRasterizer(make_solid(label, key), size, supersampling=self.supersampling)
            for label, keys in enumerate(self._keys(_OBJECT, part).tolist())
            for key in keys
        ]

    def object_ids(self, part: str) -> list[str]:
        return [f"{name}_{part}_{i}" for name in self.class_names for i in range(self.objects[part])]

    def object_labels(self, part: str) -> Tensor:
        return torch.arange(self.num_classes).repeat_interleave(self.objects[part])

    def object_keys(self, part: str) -> Tensor:
        return self._keys(_VIEW, part).flatten()

    def _keys(self, purpose: int, part: str) -> Tensor:
        """One for each object of a part, int64 (classes, objects)."""
        numbers = torch.arange(self.objects[part])
        return hash_keys(self.object_seed, purpose, _PARTS.index(part), torch.arange(self.num_classes).unsqueeze(1), numbers)
