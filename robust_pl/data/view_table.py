"""What is known of the images of objects beside their pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ViewTable:
    """Object, pose and caption of N images of M objects, in the order of a batch's ``index``.

    ``table.object[index]``, ``table.pose[index]`` and ``table.captions[i]`` are those of the images of a batch.

    Args:
        object_ids: names of the objects, M.
        object_labels: their classes, int64 (M,).
        object: number of the object of each image, int64 (N,).
        names: of each image, such as its file.
        pose: camera-to-world, float32 (N, 4, 4), z up, OpenGL camera; NaN where it is not known. None if no image has one.
        captions: one sentence an image; None if no image has one.

    Raises:
        ValueError: if the lengths do not fit together.
    """

    object_ids: list[str]
    object_labels: Tensor
    object: Tensor
    names: list[str]
    pose: Tensor | None = None
    captions: list[str] | None = None

    def __post_init__(self) -> None:
        n, m = len(self.names), len(self.object_ids)
        if len(self.object) != n or len(self.object_labels) != m:
            raise ValueError(f"{len(self.object)} objects of {n} images and {len(self.object_labels)} labels of {m} objects")
        if self.pose is not None and self.pose.shape != (n, 4, 4):
            raise ValueError(f"poses of shape {tuple(self.pose.shape)} do not fit {n} images: give (N, 4, 4)")
        if self.captions is not None and len(self.captions) != n:
            raise ValueError(f"{len(self.captions)} captions do not fit {n} images: give one each")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""
        return self.object_labels[self.object]
