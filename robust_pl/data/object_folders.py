"""Where published sets of objects keep their images, classes, captions and poses."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .transforms_json import read_transforms
from .view_files import image_names

_IMAGE_FOLDERS = ("", "images", "rgb", "train")
_NUMBERED = re.compile(r"(.+)_\d+")


class Shot(NamedTuple):
    """One image of an object.

    Args:
        name: of the file, below the root, with ``/``.
        object_id: of what it shows.
        class_name: of that.
        caption: a sentence, or None.
        pose: camera-to-world (4, 4) where a list of frames gives it, or None.
    """

    name: str
    object_id: str
    class_name: str
    caption: str | None = None
    pose: Tensor | None = None


def shots_in_folders(root: Path, classes: Mapping[str, str] | None, skip_missing: bool = False) -> list[Shot]:
    """Images of a folder of objects, in the order of their names.

    ::

        <class>/<object>/<view>.png           also in images/, rgb/ or train/ below the object, as in MVImgNet
        <class>_<number>/transforms_*.json    IM3D (and NeRF's synthetic scenes): the images that the lists of frames name
        <class>/<class>_<object>_<view>.png   MIRO
        <object>/<view>.png                   Objaverse; ``classes`` says which is what

    Args:
        root: the folder.
        classes: class by object; None takes that of the folders.
        skip_missing: leave out frames of a list without an image.

    Raises:
        FileNotFoundError: if there are no images, or some of a list of frames are missing.
        ValueError: if an object has no class, or a list of frames is damaged.
    """
    found = _images_by_object(root, skip_missing)
    shots = [Shot(file, name, _class_of(name, classes, folder), pose=pose) for name, folder, file, pose in found]
    if not shots:
        raise FileNotFoundError(
            f"{root} does not exist or holds no images in folders of objects: set data_dir or ROBUST_PL_DATA to the folder "
            "that holds <class>/<object>/<view>.png, or give metadata"
        )
    return shots


def shots_of_metadata(path: Path, classes: Mapping[str, str] | None) -> list[Shot]:
    """Images that a list names as MVCap does (Ruan et al. 2024, arXiv 2404.12139).

    It is JSON, ``[{"path": "./views/54ca/026.png", "caption": "A chair.", "obj_id": 3177, "img_id": 317726}, ...]``; captions
    may be left out, and ``img_id`` is not needed. MVCap gives no classes.

    Args:
        path: of the file.
        classes: class by object; None makes each object a class of its own.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, lacks a field, or an object has no class.
    """
    records = _json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list of records with path, obj_id and caption")
    shots = []
    for place, record in enumerate(records):
        if missing := [key for key in ("path", "obj_id") if not isinstance(record, dict) or key not in record]:
            raise ValueError(
                f"record {place} of {path} lacks {missing[0]!r}: each needs path and obj_id, and caption if any has"
            )
        name = str(record["obj_id"])
        kind = name if classes is None else _class_of(name, classes, None)
        shots.append(Shot(str(PurePosixPath(record["path"])), name, kind, record.get("caption")))
    without = [place for place, shot in enumerate(shots) if shot.caption is None]
    if without and len(without) < len(shots):
        raise ValueError(f"record {without[0]} of {path} has no caption and others have: give all or none")
    return shots


def read_classes(path: Path) -> dict[str, str]:
    """Class by object of a JSON file ``{"54ca": "chair"}``, or of a table with a line ``54ca,chair`` for each.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    if path.suffix == ".json":
        content = _json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold an object that gives the class of each object id")
        return {str(key): str(value) for key, value in content.items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the file that holds the class of each object")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if bad := [row for row in rows if len(row) != 2]:
        raise ValueError(f"{path} has the line {','.join(bad[0])!r}: each must be an object id, a comma and its class")
    return {name.strip(): kind.strip() for name, kind in rows}


def pose_beside(path: Path) -> Tensor | None:
    """Camera-to-world (4, 4) of the file that renderings of Objaverse have beside an image, world-to-camera (3, 4); or None.

    Raises:
        ValueError: if it holds something else.
    """
    beside = path.with_suffix(".npy")
    if not beside.is_file():
        return None
    try:
        matrix = np.load(beside, allow_pickle=False)
        there = np.vstack([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])
        return torch.from_numpy(np.linalg.inv(there))
    except (ValueError, OSError, EOFError, IndexError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{beside} holds no camera (3, 4), world to camera ({error}): render the view again") from error


def _class_of(name: str, classes: Mapping[str, str] | None, folder: str | None) -> str:
    """The class of an object: of the table if there is one, else of its folder, else of its own numbered name."""
    numbered = _NUMBERED.fullmatch(name)
    found = classes.get(name) if classes is not None else folder or (numbered and numbered[1])
    if not found:
        raise ValueError(
            f"the object {name!r} has no class: "
            + ("add it to the file of classes" if classes is not None else "put it into a folder of its class, or give classes")
        )
    return found


def _images_by_object(root: Path, skip_missing: bool) -> Iterator[tuple[str, str | None, str, Tensor | None]]:
    """Object, folder of its class if it has one, file and pose of each image."""
    for folder in _subfolders(root):
        listed = _frames(folder, skip_missing) or _without_pose(image_names(folder))
        series = _series(folder.name, [image for image, _ in listed])
        for image, pose in listed:
            yield series.get(image, folder.name), folder.name if series else None, f"{folder.name}/{image}", pose
        for inner in [] if listed else _subfolders(folder):
            name = f"{folder.name}/{inner.name}"
            for image, pose in _frames(inner, skip_missing) or _without_pose(_images_below(inner)):
                yield name, folder.name, f"{name}/{image}", pose


def _series(folder: str, images: list[str]) -> dict[str, str]:
    """Object by image where all in a class folder are named ``<class>_<object>_<view>``, as in MIRO; else nothing."""
    pattern = re.compile(re.escape(folder) + r"_.+(?=_\d+$)")
    found = {image: pattern.match(PurePosixPath(image).stem) for image in images}
    return {image: match[0] for image, match in found.items() if match} if all(found.values()) else {}


def _images_below(folder: Path) -> list[str]:
    for inner in _IMAGE_FOLDERS:
        if images := image_names(folder / inner):
            return [f"{inner}/{image}" if inner else image for image in images]
    return []


def _without_pose(images: list[str]) -> list[tuple[str, Tensor | None]]:
    return [(image, None) for image in images]


def _frames(folder: Path, skip_missing: bool) -> list[tuple[str, Tensor | None]]:
    """Images and poses that the lists of frames in a folder name; none if there is no list."""
    photos = [photo for path in sorted(folder.glob("transforms*.json")) for photo in read_transforms(path, skip_missing)]
    # A list may name images outside of its folder.
    return [(Path(os.path.relpath(photo.file, folder)).as_posix(), photo.pose) for photo in photos]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: give the file, or its place below data_dir") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
