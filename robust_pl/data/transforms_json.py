"""Photos with poses in ``transforms.json``, as NeRF's synthetic scenes and Instant-NGP have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cameras import Photo, camera_from

ENDINGS = (".png", ".jpg", ".jpeg")
"""Of pictures that a file names without one."""


def read_transforms(file: Path, skip_missing: bool = False) -> list[Photo]:
    """The frames of a ``transforms.json``.

    Intrinsics stand beside the frames or in them: ``fl_x``, ``fl_y``, ``cx``, ``cy``, ``k1``, ``k2``, ``p1``, ``p2``, ``w``,
    ``h`` as colmap2nerf of Instant-NGP writes them, or ``camera_angle_x`` alone, the field of view in radians. Poses are
    camera-to-world with OpenGL axes, z is up. ``aabb_scale`` and what else there is are not read.

    Args:
        file: its path.
        skip_missing: leave out frames without a picture, which Instant-NGP's own fox has.

    Raises:
        ValueError: if there are no poses, a pose is no finite 4 x 4 matrix, or the intrinsics are missing.
        FileNotFoundError: if pictures are missing, naming how many.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        frames = content.get("frames") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON of a scene ({error}): give one with frames and poses") from error
    if not frames:
        raise ValueError(f"{file} has no poses: its frames are empty")
    photos = [_photo(file, number, {**content, **frame}) for number, frame in enumerate(frames)]
    there = [photo for photo in photos if photo.file.is_file()]
    if len(there) < len(photos) and not (skip_missing and there):
        first = next(photo.file for photo in photos if not photo.file.is_file())
        remedy = ": add them, or leave those frames out with skip_missing" if there else ": give the folder that has them"
        raise FileNotFoundError(
            f"{file} lists {len(photos)} frames and {len(photos) - len(there)} of their pictures are missing, such as "
            f"{first}{remedy}"
        )
    return there


def _photo(file: Path, number: int, frame: dict[str, Any]) -> Photo:
    if "file_path" not in frame or "transform_matrix" not in frame:
        raise ValueError(f"{file}: frame {number} has no pose: it needs file_path and transform_matrix")
    picture = file.parent / frame["file_path"]
    if picture.suffix.lower() not in ENDINGS:
        named = [picture.with_name(picture.name + ending) for ending in ENDINGS]
        picture = next((path for path in named if path.is_file()), named[0])
    pose = _pose(file, number, frame["transform_matrix"])
    if "fl_x" in frame and "w" in frame and "h" in frame:
        return Photo(picture, pose, camera_from(frame))
    if "camera_angle_x" not in frame:
        raise ValueError(f"{file} does not say how wide its camera sees: it needs camera_angle_x, or fl_x with w and h")
    return Photo(picture, pose, None, float(frame["camera_angle_x"]))


def _pose(file: Path, number: int, rows: Any) -> Tensor:
    try:
        pose = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError):
        pose = torch.full((1,), torch.nan)
    if pose.shape != (4, 4) or not pose.isfinite().all():
        raise ValueError(f"{file}: the transform_matrix of frame {number} must be 4 x 4 finite numbers")
    return pose
