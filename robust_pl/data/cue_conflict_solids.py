"""Cue conflicts that need no download: procedural solids whose shape and texture are of different classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..scenes.mesh import Mesh
from ..scenes.natural import USUAL_ELEVATION
from ..scenes.paint import class_picture
from ..scenes.rasterizer import MeshRasterizer
from ..scenes.renderer import Renderer
from ..scenes.solids import SOLIDS, make_solid
from .augmentations import Augmentation
from .hashing import hash_keys
from .scene_views import SceneViewsDataModule

_PARTS = ("train", "val", "test")
_CLASSES = len(SOLIDS)


class CueConflictSolidsDataModule(SceneViewsDataModule):
    """Solids whose class can be told by shape and by texture alike, and test images in which the two say different things.

    This is our own construction in the spirit of Geirhos et al. 2019 (arXiv 1811.12231), not their benchmark. Each of the ten
    classes of :data:`robust_pl.scenes.SOLIDS` has a texture of its own, a pattern and two colours. Training and validation
    objects wear the texture of their class, so that a network may learn either cue, or both. Test objects wear that of another
    class: all 90 pairs. The label is the class of the shape, so that accuracy is the share of shape decisions;
    :class:`robust_pl.callbacks.ShapeBias` also counts those for the texture, which ``test_textures`` holds.

    Images are rendered in ``setup`` as those of :class:`ProceduralViewsDataModule` are, from natural views. Networks that were
    trained there have never seen that a texture means anything: train on this set to measure what training prefers.

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
        test_objects: of each of the 90 pairs of shape and texture.
        views_per_object: images of each object.
        background: a grey value in [0, 1], 1 is white; or ``textures``, one of 100 procedural pictures.
        supersampling: s renders s * s samples a pixel, which softens edges; costs about s * s.
        object_seed: another number is another data set.

    Raises:
        ValueError: if an argument is out of range.
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
        train_objects: int = 20,
        val_objects: int = 2,
        test_objects: int = 1,
        views_per_object: int = 20,
        background: float | Literal["textures"] = 1.0,
        supersampling: int = 1,
        object_seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("train_objects", train_objects, 1),
            ("val_objects", val_objects, 0),
            ("test_objects", test_objects, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        super().__init__(
            data_dir,
            batch_size,
            eval_batch_size,
            num_workers,
            max(0, _CLASSES * val_objects * views_per_object),
            seed,
            augment,
            drop_last,
            "last",
            image_size,
            views_per_object,
            "natural",
            USUAL_ELEVATION,
            None,
            background,
            supersampling,
            object_seed,
        )
        self.objects = dict(zip(_PARTS, (train_objects, val_objects, test_objects), strict=True))

    @property
    def test_textures(self) -> Tensor:
        """Classes of the textures of the test images, int64 (N,)."""
        return self._cues("test")[1].repeat_interleave(self.views_per_object)

    def renderers(self, part: str) -> list[Renderer]:
        size = self.image_shape[1:]
        return [
            MeshRasterizer(_wearing(make_solid(shape, key), texture), size, supersampling=self.supersampling)
            for shape, texture, key in zip(
                *(column.tolist() for column in (*self._cues(part), self.object_keys(part))), strict=True
            )
        ]

    def object_ids(self, part: str) -> list[str]:
        shapes, textures = self._cues(part)
        names = [f"{SOLIDS[s]}_in_{SOLIDS[t]}" for s, t in zip(shapes.tolist(), textures.tolist(), strict=True)]
        return [f"{name}_{part}_{i % self.objects[part]}" for i, name in enumerate(names)]

    def object_labels(self, part: str) -> Tensor:
        return self._cues(part)[0]

    def object_keys(self, part: str) -> Tensor:
        shapes, textures = self._cues(part)
        number = torch.arange(len(shapes)) % max(1, self.objects[part])
        return hash_keys(self.object_seed, _PARTS.index(part), shapes, textures, number)

    def _cues(self, part: str) -> tuple[Tensor, Tensor]:
        """Classes of the shapes and of the textures of the objects of a part, int64 (objects,) each."""
        pairs = torch.cartesian_prod(torch.arange(_CLASSES), torch.arange(_CLASSES))
        conflict = pairs[:, 0] != pairs[:, 1]
        chosen = pairs[conflict if part == "test" else ~conflict].repeat_interleave(self.objects[part], 0)
        return chosen[:, 0], chosen[:, 1]


def _wearing(solid: Mesh, texture: int) -> Mesh:
    """The solid in the texture of a class."""
    return Mesh(
        solid.vertices,
        solid.faces,
        normals=solid.normals,
        uv=solid.uv,
        textures=[class_picture(texture, _CLASSES)],
    )
