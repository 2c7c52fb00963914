"""Photos with poses as COLMAP writes them: ``cameras`` and ``images``, as text or binary."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .cameras import Camera, Photo

MODELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("SIMPLE_PINHOLE", ("f", "cx", "cy")),
    ("PINHOLE", ("fx", "fy", "cx", "cy")),
    ("SIMPLE_RADIAL", ("f", "cx", "cy", "k1")),
    ("RADIAL", ("f", "cx", "cy", "k1", "k2")),
    ("OPENCV", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2")),
)
"""The camera models that are read, in the order of their numbers in binary files."""


class _Image(NamedTuple):
    turn: Sequence[float]  # world-to-camera, as a quaternion w, x, y, z
    shift: Sequence[float]
    camera: int
    name: str


def read_colmap(folder: Path, pictures: Path, skip_missing: bool = False) -> list[Photo]:
    """The images of a reconstruction, in the order of their names.

    COLMAP's cameras look along +z with y down; the poses that are returned are camera-to-world with OpenGL axes. Its world has
    no up: see ``up`` of :class:`PosedPhotosDataModule`.

    Args:
        folder: that holds ``cameras.bin`` and ``images.bin``, or the same with ``.txt``.
        pictures: folder of the images.
        skip_missing: leave out images without a file.

    Raises:
        FileNotFoundError: if a table is missing, or pictures are, naming how many.
        ValueError: if a table is damaged, there are no poses, or the camera model is another one.
    """
    ending = ".bin" if (folder / "images.bin").is_file() else ".txt"
    tables = [folder / f"{name}{ending}" for name in ("cameras", "images")]
    for table in tables:
        if not table.is_file():
            raise FileNotFoundError(f"{table} does not exist: give the folder of a COLMAP reconstruction, such as sparse/0")
    read = (_binary_cameras, _binary_images) if ending == ".bin" else (_text_cameras, _text_images)
    try:
        cameras, images = read[0](tables[0]), read[1](tables[1])
        found = sorted(images, key=lambda image: image.name)
        photos = [Photo(pictures / one.name, _pose(one), cameras[one.camera]) for one in found]
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: its cameras and images do not fit together ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    if not photos:
        raise ValueError(f"{tables[1]} has no poses: no image was registered")
    there = [photo for photo in photos if photo.file.is_file()]
    if len(there) < len(photos) and not (skip_missing and there):
        raise FileNotFoundError(
            f"{tables[1]} lists {len(photos)} images and {len(photos) - len(there)} are missing in {pictures}: add them, or "
            "leave them out with skip_missing"
        )
    return there


def _pose(image: _Image) -> Tensor:
    """Camera-to-world (4, 4)."""
    w, x, y, z = torch.nn.functional.normalize(torch.tensor(image.turn, dtype=torch.float64), dim=0).tolist()
    turn = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = turn.T * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    pose[:3, 3] = -turn.T @ torch.tensor(image.shift, dtype=torch.float64)
    return pose


def _camera(model: str, width: int, height: int, numbers: Sequence[float]) -> Camera:
    names = dict(MODELS).get(model)
    if names is None:
        known = ", ".join(name for name, _ in MODELS)
        raise ValueError(f"the camera model {model} is not read: undistort the images in COLMAP, or use one of {known}")
    if len(numbers) != len(names):
        raise ValueError(f"a camera {model} has {len(names)} numbers, not {len(numbers)}")
    known_numbers = dict(zip(names, numbers, strict=True))
    if "f" in known_numbers:
        known_numbers["fx"] = known_numbers["fy"] = known_numbers.pop("f")
    return Camera(width, height, **known_numbers)


def _lines(table: Path) -> list[str]:
    """Without comments; an empty line counts, it is an image without points."""
    return [line for line in table.read_text().splitlines() if not line.startswith("#")]


def _text_cameras(table: Path) -> dict[int, Camera]:
    cameras = {}
    for line in filter(str.strip, _lines(table)):
        number, model, width, height, *numbers = line.split()
        cameras[int(number)] = _camera(model, int(width), int(height), [float(value) for value in numbers])
    return cameras


def _text_images(table: Path) -> list[_Image]:
    images = []
    for line in _lines(table)[::2]:  # each is followed by its points
        if line.strip():
            _, *pose, camera, name = line.split(maxsplit=9)
            values = [float(value) for value in pose]
            images.append(_Image(values[:4], values[4:], int(camera), name))
    return images


class _Reader:
    """Little-endian values, one after the other."""

    def __init__(self, table: Path) -> None:
        self.content, self.place = table.read_bytes(), 0

    def __call__(self, layout: str) -> tuple[float, ...]:
        values = struct.unpack_from("<" + layout, self.content, self.place)
        self.place += struct.calcsize("<" + layout)
        return values

    def text(self) -> str:
        end = self.content.index(b"\0", self.place)
        found, self.place = self.content[self.place : end].decode(), end + 1
        return found


def _binary_cameras(table: Path) -> dict[int, Camera]:
    read, cameras = _Reader(table), {}
    for _ in range(int(read("Q")[0])):
        number, model, width, height = map(int, read("iiQQ"))
        if not 0 <= model < len(MODELS):
            raise ValueError(f"{table} has a camera of model number {model}: undistort the images in COLMAP first")
        name, numbers = MODELS[model]
        cameras[number] = _camera(name, width, height, read(f"{len(numbers)}d"))
    return cameras


def _binary_images(table: Path) -> list[_Image]:
    read, images = _Reader(table), []
    for _ in range(int(read("Q")[0])):
        _, *pose, camera = read("i7di")
        name = read.text()
        points = int(read("Q")[0])
        read.place += 24 * points
        images.append(_Image(pose[:4], pose[4:], int(camera), name))
    return images
