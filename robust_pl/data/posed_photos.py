"""Photos of one scene with the poses of their cameras, as rays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from .cameras import Photo
from .colmap import read_colmap
from .hashing import ORDER, hash_keys, integers
from .placement import Axis, place
from .transforms_json import read_transforms

TRANSFORMS = ("transforms.json", "transforms_train.json")
RECONSTRUCTIONS = ("sparse/0", "sparse", "colmap/sparse/0", ".")


class Rays(NamedTuple):
    """Rays (R,) of pixels; of a whole photo, row by row."""

    origin: Tensor  # (R, 3)
    direction: Tensor  # unit vectors (R, 3)
    rgb: Tensor  # colours (R, 3) in [0, 1], already multiplied by alpha
    alpha: Tensor  # (R,), 1 where the photo has none
    key: int  # the step's, for what else has to be drawn; the photo's number in validation
    size: tuple[int, int]  # height and width of the photo; (R, 1) in training

    def image(self, values: Tensor) -> Tensor:
        """Values (C, R) of a whole photo as (C, H, W)."""
        return values.view(-1, *self.size)


class RayLoader:
    """Random rays in batches, without end to them: which ones is a function of the seed and the step alone.

    Args:
        photos: whose rays.
        batch_size: rays a batch.
        length: batches an epoch.
        seed: of the draws.
        step: tells how many batches training has had; without it they are counted from 0 for each iterator.
    """

    def __init__(
        self, photos: list[Rays], batch_size: int, length: int, seed: int, step: Callable[[], int] | None = None
    ) -> None:
        self.direction, self.rgb, self.alpha = (
            torch.cat([getattr(photo, name) for photo in photos]) for name in ("direction", "rgb", "alpha")
        )
        # One a photo, not one a ray.
        self.origin = torch.stack([photo.origin[0] for photo in photos])
        self._end = torch.tensor([len(photo.alpha) for photo in photos]).cumsum(0)
        self.batch_size, self.length, self.seed, self.step = batch_size, length, seed, step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Rays]:
        for number in range(self.length):
            yield self.batch(number if self.step is None else self.step())

    def batch(self, step: int) -> Rays:
        """That of a step; drawn with replacement."""
        key = hash_keys(self.seed, ORDER, step)
        index = integers(hash_keys(key, torch.arange(self.batch_size)), 0, len(self.alpha))
        photo = torch.searchsorted(self._end, index, right=True)
        values = (self.origin[photo], self.direction[index], self.rgb[index], self.alpha[index])
        return Rays(*values, int(key), (self.batch_size, 1))

    def state_dict(self) -> dict[str, int]:
        """So that Lightning knows that a run may stop within an epoch: the step alone says where it goes on."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """There is nothing to restore."""


class PhotoLoader:
    """Whole photos, one a batch, in their order."""

    def __init__(self, photos: list[Rays]) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __iter__(self) -> Iterator[Rays]:
        return iter(self.photos)


class PosedPhotosDataModule(LightningDataModule):
    """Photos with poses: ``transforms.json`` of Instant-NGP and NeRF, or a COLMAP reconstruction; gives rays.

    Training batches are random rays of all photos but every n-th, validation and test batches the whole photos held out, one
    each. Lens distortion is undone, alpha is kept. The world is moved so that cameras see what :class:`ViewSpace` expects: an
    object at the origin, z up. See :class:`Rays` for what a batch holds. One process. All photos are in
    memory, in about 60 bytes a pixel that is left: ``downscale`` those of a camera.

    Args:
        folder: of the scene, in ``data_dir``: with ``transforms.json`` or ``transforms_train.json``; or with ``sparse/0`` of
            COLMAP (text or binary) and ``images``.
        data_dir: default the environment variable ROBUST_PL_DATA, else ``./data``.
        batch_size: rays a step.
        steps_per_epoch: batches an epoch, of rays drawn with replacement.
        hold_out: every so many-th photo is held out, from the first on.
        downscale: factor by which photos shrink when they are read, by the mean of pixels.
        skip_missing: leave out frames whose picture is missing.
        center: what becomes the origin: a point of the file's world, or ``cameras``, the point nearest to all optical axes.
        scale: factor of the world, or ``cameras``: their mean distance from the origin becomes 4, where ViewSpace looks from.
        up: which way is up in the file's world, x, y, z or the opposite -x, ..., or ``cameras``: their mean up. None is z for
            ``transforms.json``, as Blender and Instant-NGP have it, and ``cameras`` for COLMAP.
        seed: of the draws.

    Raises:
        ValueError: if an argument is out of range; on reading, if there are no poses or a photo is not of its camera's size.
        FileNotFoundError: on reading, if photos are missing.
    """

    def __init__(
        self,
        folder: str,
        data_dir: str | None = None,
        batch_size: int = 2048,
        steps_per_epoch: int = 200,
        hold_out: int = 8,
        downscale: int = 1,
        skip_missing: bool = False,
        center: Literal["cameras"] | tuple[float, float, float] = (0.0, 0.0, 0.0),
        scale: Literal["cameras"] | float = 1.0,
        up: Axis | Literal["cameras"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "steps_per_epoch": 1, "hold_out": 2, "downscale": 1}
        given = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "hold_out": hold_out, "downscale": downscale}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name}={value} must be at least {least[name]}")
        if scale != "cameras" and not float(scale) > 0:
            raise ValueError(f"scale={scale} must lie above 0")
        self.folder = Path(data_dir or os.environ.get("ROBUST_PL_DATA") or "data").expanduser() / folder
        self.batch_size, self.steps_per_epoch, self.hold_out, self.downscale = given.values()
        self.skip_missing, self.center, self.scale, self.up, self.seed = skip_missing, center, scale, up, seed

    def __str__(self) -> str:  # Lightning's would read all photos
        return f"{type(self).__name__}({self.folder})"

    @cached_property
    def photos(self) -> list[Photo]:
        """As they lie on disk, with poses in the world of the scene."""
        found, up = self._read()
        poses = place(torch.stack([photo.pose for photo in found]), self.center, self.scale, self.up or up)
        return [photo._replace(pose=pose) for photo, pose in zip(found, poses, strict=True)]

    @property
    def poses(self) -> Tensor:
        """Camera-to-world (N, 4, 4), float64, of all photos."""
        return torch.stack([photo.pose for photo in self.photos])

    @cached_property
    def train_rays(self) -> list[Rays]:
        """Of each photo to fit."""
        return [self._rays(i) for i in range(len(self.photos)) if i % self.hold_out]

    @cached_property
    def held_out_rays(self) -> list[Rays]:
        """Of each photo held out."""
        return [self._rays(i) for i in range(0, len(self.photos), self.hold_out)]

    def setup(self, stage: str) -> None:
        """Read what the stage needs, so that a missing file is reported before anything runs."""
        if len(self.photos) < 2:
            raise ValueError(f"{self.folder} has one photo: a scene needs at least two, one of which is held out")
        _ = self.held_out_rays if stage != "fit" else (self.train_rays, self.held_out_rays)

    def train_dataloader(self) -> RayLoader:
        trainer = self.trainer
        step = None if trainer is None else lambda: trainer.global_step
        return RayLoader(self.train_rays, self.batch_size, self.steps_per_epoch, self.seed, step)

    def val_dataloader(self) -> PhotoLoader:
        return PhotoLoader(self.held_out_rays)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _read(self) -> tuple[list[Photo], Axis | Literal["cameras"]]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} does not exist: set data_dir or ROBUST_PL_DATA to the folder that holds the scene"
            )
        for name in TRANSFORMS:
            if (self.folder / name).is_file():
                return read_transforms(self.folder / name, self.skip_missing), "z"
        for name in RECONSTRUCTIONS:
            if any((self.folder / name / f"images{ending}").is_file() for ending in (".bin", ".txt")):
                return read_colmap(self.folder / name, self.folder / "images", self.skip_missing), "cameras"
        raise FileNotFoundError(f"{self.folder} has no poses: it needs {', '.join(TRANSFORMS)}, or sparse/0 of COLMAP")

    def _rays(self, number: int) -> Rays:
        photo = self.photos[number]
        with Image.open(photo.file) as picture:
            camera = photo.camera_of(*picture.size)
            mode = "RGBA" if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info else "RGB"
            pixels = torch.from_numpy(np.asarray(picture.convert(mode)).copy()).permute(2, 0, 1).float() / 255
        rgb, alpha = pixels[:3], pixels[3:] if mode == "RGBA" else torch.ones_like(pixels[:1])
        height, width = camera.height // self.downscale, camera.width // self.downscale
        if min(height, width) < 1:
            raise ValueError(f"downscale={self.downscale} leaves nothing of {photo.file}")
        whole = F.interpolate(torch.cat([rgb * alpha, alpha])[None], (height, width), mode="area")[0]
        local = camera.resized(width, height).directions().flatten(0, 1)
        direction = (local @ photo.pose[:3, :3].T).float()
        origin = photo.pose[:3, 3].float().expand_as(direction)
        return Rays(origin, direction, whole[:3].flatten(1).T.contiguous(), whole[3].flatten(), number, (height, width))
