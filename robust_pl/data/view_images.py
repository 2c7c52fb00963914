"""The evaluation folder that a viewpoint attack writes, read again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import Images


class ViewImages(Images):
    """Images of objects from extreme viewpoints, with what is known of each.

    Labels come from the table, not from the names of the class folders: few of a network's classes may be there.

    Args:
        folder: that holds ``views.csv``, see :mod:`robust_pl.callbacks.viewpoints.images`.
        kind: ``sample`` for the views drawn from the found distributions, ``worst`` for the worst one of each object.

    Raises:
        FileNotFoundError: if the table or an image is missing.
        ValueError: if the table lacks a column, or has no such image.
    """

    def __init__(self, folder: str | Path, kind: Literal["sample", "worst"] = "sample") -> None:
        self.folder = Path(folder)
        table = self.folder / "views.csv"
        if not table.is_file():
            raise FileNotFoundError(f"no views.csv in {folder}: give the folder that a test with a viewpoint attack wrote")
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if missing := [key for key in ("file", "kind", "object", "label") if rows and key not in rows[0]]:
            raise ValueError(f"{table} lacks the column {missing[0]!r}")
        self.rows: list[dict[str, str]] = [row for row in rows if row["kind"] == kind]
        """The table, one row an image."""
        if not self.rows:
            raise ValueError(f"{table} has no image of kind {kind!r}")
        if absent := [row["file"] for row in self.rows if not (self.folder / row["file"]).is_file()]:
            raise FileNotFoundError(f"{table} names {absent[0]}, which is not there: run the test again, it goes on")
        self.labels = torch.tensor([int(row["label"]) for row in self.rows])
        self.about: dict[str, Any] = json.loads((self.folder / "views.json").read_text())
        """Settings of the attack, and what all rows share."""

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Tensor:
        """A column of numbers of the table, float64 (N,).

        Raises:
            ValueError: if there is none of that name.
        """
        if name not in self.rows[0]:
            raise ValueError(f"{self.folder} has no column {name!r}: choose one of {', '.join(self.rows[0])}")
        return torch.tensor([float(row[name]) for row in self.rows], dtype=torch.float64)

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        with Image.open(self.folder / self.rows[position]["file"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), int(self.labels[position])
