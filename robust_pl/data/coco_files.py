"""Images with boxes, in files of COCO's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image_files import read_image

IMAGES, ANNOTATIONS = "val2017", "annotations/instances_val2017.json"


class CocoFiles(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and boxes of a folder with ``val2017`` and ``annotations/instances_val2017.json``, as COCO and each domain of
    COCO-O.

    An item is an image float32 (3, H, W) in [0, 1], as torchvision's detectors take it, and its target: ``boxes`` float32 (N,
    4) as left, top, right, bottom in pixels, ``labels`` int64 (N,), which are COCO's category numbers, ``area`` float32 (N,),
    ``iscrowd`` int64 (N,) and ``image_id`` int64 (). Images without a box belong to the set, too.

    Args:
        folder: that holds the two.

    Raises:
        FileNotFoundError: if one of them, or an image, is missing.
        ValueError: if the annotations are not of COCO's form, or an image, when it is read, is damaged or of another size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / ANNOTATIONS
        for path in (file, self.folder / IMAGES):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} does not exist: {self.folder} must hold {IMAGES} and {ANNOTATIONS}, as COCO does"
                )
        try:
            content = json.loads(file.read_text("utf-8"))
            self.images: list[dict[str, Any]] = sorted(content["images"], key=lambda image: int(image["id"]))
            boxes: dict[int, list[dict[str, Any]]] = {int(image["id"]): [] for image in self.images}
            for one in content["annotations"]:
                boxes[int(one["image_id"])].append(one)
            self.targets = [_target(int(image["id"]), boxes[int(image["id"])]) for image in self.images]
            names = [str(image["file_name"]) for image in self.images]
            self.sizes = [(int(image["height"]), int(image["width"])) for image in self.images]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file} is not of COCO's form ({reason}): unpack the set again") from error
        self.paths = [self.folder / IMAGES / name for name in names]
        if missing := [path for path in self.paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.paths)} images of {file} are missing, such as {missing[0]}: unpack the set again"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = read_image(self.paths[position])
        if (image.height, image.width) != self.sizes[position]:
            height, width = self.sizes[position]
            raise ValueError(
                f"{self.paths[position]} is an image of {image.width} x {image.height} pixels and its boxes are for {width} x "
                f"{height}: put the original there"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255), self.targets[position]


def _target(image_id: int, annotations: list[dict[str, Any]]) -> dict[str, Tensor]:
    boxes = torch.tensor([one["bbox"] for one in annotations], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # stored as left, top, width, height
    return {
        "image_id": torch.tensor(image_id),
        "boxes": boxes,
        "labels": torch.tensor([int(one["category_id"]) for one in annotations], dtype=torch.int64),
        "area": torch.tensor([float(one["area"]) for one in annotations]),
        "iscrowd": torch.tensor([int(one.get("iscrowd", 0)) for one in annotations], dtype=torch.int64),
    }
