"""Objects from the user's files, meshes and fitted fields, as views and scenes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..scenes.field import RadianceField
from ..scenes.mesh_files import UP, load_mesh
from ..scenes.natural import USUAL_ELEVATION
from ..scenes.rasterizer import MeshRasterizer
from ..scenes.renderer import Renderer
from ..scenes.view_space import Range, ViewSpace
from .augmentations import Augmentation
from .base import ValSplit
from .hashing import hash_keys, seed_from
from .images import ImagesInMemory
from .object_split import Share, check_share, split_objects
from .scene_views import SceneViewsDataModule

FIELD = ".ckpt"
ENDINGS: tuple[str, ...] = (*UP, FIELD)


class SceneFilesDataModule(SceneViewsDataModule):
    """Views of objects in files, split by object: meshes, and radiance fields that :class:`robust_pl.methods.FieldFit` fitted.

    ::

        <class>/<object>.glb            a mesh: .obj, .ply, .gltf or .glb, as robust_pl.scenes.load_mesh reads it
        <class>/<object>.ckpt           a field, as robust_pl.scenes.RadianceField.load reads it
        <class>/<object>/<any>.obj      the one such file in a folder, which may hold its materials and pictures

    A test with viewpoint attacks needs nothing else, with ``test_objects: all`` where a network is already trained. What views,
    scenes and metadata are is told in :class:`SceneViewsDataModule`; views are a function of ``object_seed`` and the name.

    Args:
        data_dir: the folder of the classes; default the environment variable ROBUST_PL_DATA, else ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; the images are in memory, so 0 is good.
        seed: of the validation objects, the order and the augmentation.
        augment: whether training images are mirrored half of the time; or a list of augmentations, see
            :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        image_size: height and width, in pixels.
        val_objects: objects of each class for validation, as a fraction or a number; 0 for none.
        test_objects: objects of each class for the test, likewise; or ``all``, which leaves none to train on.
        held_out: which those are: ``random`` ones, of the test the same for every seed; or the ``last`` ones by their names.
        classes: names of the network's classes in the order of its logits, among which the folders are; None takes the folders.
        views_per_object: images of each object.
        views: ``natural`` or ``random`` views to train on.
        elevation: of natural views, lowest and highest, in degrees above the horizon.
        view_space: see :class:`SceneViewsDataModule`. Of a field that was fitted to photos keep to where they were taken:
            elsewhere it shows what no photo has seen.
        background: a grey value in [0, 1], or ``textures``, see :class:`SceneViewsDataModule`.
        supersampling: of meshes, s * s samples a pixel.
        up: axis of the mesh files that points up; None takes that of the format.
        radius: meshes are moved to the origin and scaled to this radius; fields stay as they are.
        fov_x: horizontal field of view in degrees.
        object_seed: of the views.

    Raises:
        FileNotFoundError: if there are no objects, or a mesh names a file that is missing.
        ValueError: if an argument is out of range, a file cannot be read, an object has no class, a class has too few objects,
            or a camera could stand inside an object or miss it.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool | list[Augmentation] = False,
        drop_last: bool = True,
        image_size: int = 64,
        val_objects: Share = 0.1,
        test_objects: Share | Literal["all"] = 0.2,
        held_out: ValSplit = "random",
        classes: Sequence[str] | None = None,
        views_per_object: int = 50,
        views: Literal["natural", "random"] = "natural",
        elevation: Range = USUAL_ELEVATION,
        view_space: ViewSpace | None = None,
        background: float | Literal["textures"] = 1.0,
        supersampling: int = 1,
        up: Literal["y", "z"] | None = None,
        radius: float = 1.0,
        fov_x: float = 39.6,
        object_seed: int = 0,
    ) -> None:
        check_share("val_objects", val_objects)
        if test_objects != "all":
            check_share("test_objects", test_objects)
        super().__init__(
            data_dir,
            batch_size,
            eval_batch_size,
            num_workers,
            0 if test_objects == "all" else val_objects,
            seed,
            augment,
            drop_last,
            held_out,
            image_size,
            views_per_object,
            views,
            elevation,
            view_space,
            background,
            supersampling,
            object_seed,
        )
        self.val_objects, self.test_objects, self.held_out, self.classes = val_objects, test_objects, held_out, classes
        self.up, self.radius, self.fov_x = up, radius, fov_x

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return sorted({Path(name).parts[0] for name in self._files}) if self.classes is None else list(self.classes)

    def renderers(self, part: str) -> list[Renderer]:
        return [self._renderer(self._files[name]) for name in self.object_ids(part)]

    def object_ids(self, part: str) -> list[str]:
        return self._parts[part]

    def object_labels(self, part: str) -> Tensor:
        labels = {name: i for i, name in enumerate(self.class_names)}
        return torch.tensor([labels[Path(name).parts[0]] for name in self.object_ids(part)], dtype=torch.int64)

    def object_keys(self, part: str) -> Tensor:
        keys = torch.tensor([seed_from("view", name) for name in self.object_ids(part)], dtype=torch.int64)
        return hash_keys(self.object_seed, keys)

    def load_train(self) -> ImagesInMemory:
        if not self.object_ids("train"):
            raise ValueError("test_objects=all leaves no object to train on: give a number, or use robust-pl test")
        return super().load_train()

    def load_test(self) -> ImagesInMemory:
        if not self.object_ids("test"):
            raise ValueError(f"test_objects={self.test_objects} leaves no object to test on: raise it")
        return super().load_test()

    def _renderer(self, file: Path) -> Renderer:
        size = (self.image_shape[1], self.image_shape[2])
        if file.suffix == FIELD:
            return RadianceField.load(file, image_size=size, fov_x=self.fov_x)
        mesh = load_mesh(file, up=self.up, radius=self.radius)
        return MeshRasterizer(mesh, size, self.fov_x, supersampling=self.supersampling)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """File by name of the object, ``<class>/<object>``."""
        found: dict[str, Path] = {}
        for path in sorted(self.data_dir.glob("*")) if self.data_dir.is_dir() else []:
            if path.suffix.lower() in ENDINGS:
                raise ValueError(f"the object {path.name!r} has no class: put it into a folder of its class")
            for inner in sorted(path.glob("*")) if path.is_dir() else []:
                files, name = _scenes_in(inner), f"{path.name}/{inner.name if inner.is_dir() else inner.stem}"
                if len(files) > 1:
                    raise ValueError(f"{inner} holds {files[0].name} and {files[1].name}: leave one file for each object")
                if files and name in found:
                    raise ValueError(f"the object {name} is there twice, as {found[name].name} and {inner.name}: remove one")
                found |= {name: files[0]} if files else {}
        if not found:
            raise FileNotFoundError(
                f"{self.data_dir} does not exist or holds no objects: set data_dir or ROBUST_PL_DATA to a folder with "
                f"<class>/<object>{{{','.join(ENDINGS)}}}"
            )
        return found

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Names of the objects of training, validation and test, class by class."""
        groups: dict[str, list[str]] = {}
        for name in self._files:
            groups.setdefault(Path(name).parts[0], []).append(name)
        if unknown := [kind for kind in groups if kind not in self.class_names]:
            raise ValueError(f"the objects of {unknown[0]!r} have no class: it is not among classes, so name it there")
        if self.test_objects == "all":
            return {"train": [], "val": [], "test": list(self._files)}
        split = split_objects(groups, self.val_objects, self.test_objects, self.held_out, self.seed)
        return dict(zip(("train", "val", "test"), split, strict=True))


def _scenes_in(path: Path) -> list[Path]:
    """Files of scenes that a path is, or that lie in it if it is a folder."""
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in ENDINGS and file.is_file()]
