"""Whether a network goes by shape or by texture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...functional.cue_conflict import count_decisions
from ...report.record import Cell, Lines, Record, Sheet
from .base import Analysis


class ShapeBias(Analysis):
    """Shape bias on images whose shape and texture are of different classes (Geirhos et al. 2019, arXiv 1811.12231).

    Of the images that the network assigns to the class of their shape or of their texture, the share that goes by shape. Beside
    it stands the cue-conflict accuracy, the share of images that are assigned to either: where it is low, the bias says little.
    Images of which both say the same are left out. One forward pass for each image.

    The data must tell the textures: :class:`robust_pl.data.CueConflictDataModule`, for networks of ImageNet's classes, or
    :class:`robust_pl.data.CueConflictSolidsDataModule`.

    Args:
        textures: class of the texture of each test image, by its position, where no data module tells.
        samples: only those at a position in the test set below this are looked at; None for all.
        name: of figures and files; None takes ``shapebias``.
        folder: where a run's files go; None takes ``analysis`` in the run's.

    Raises:
        ValueError: if the data do not tell the textures of their images.
    """

    def __init__(
        self,
        textures: list[int] | None = None,
        samples: int | None = None,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(samples, name, folder)
        self.textures = textures
        self._textures = torch.empty(0, dtype=torch.int64)
        self._names: list[str] | None = None

    def begin(self, model: nn.Module, data: Any) -> None:
        textures = self.textures if self.textures is not None else getattr(data, "test_textures", None)
        if textures is None:
            raise ValueError(
                f"{'the data' if data is None else type(data).__name__} cannot tell the textures of its images, which "
                "ShapeBias needs: test on CueConflictDataModule or CueConflictSolidsDataModule, or give textures"
            )
        self._textures = torch.as_tensor(textures)
        self._names = getattr(data, "class_names", None)

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        if int(index.max()) >= len(self._textures):
            raise ValueError(
                f"there are {len(self._textures)} textures and an image at position {int(index.max())}: give one for each image"
            )
        self.keep(prediction=self.ask(model, x).argmax(1), shape=y)

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        texture = self._textures[kept["index"]]
        prediction, shape = kept["prediction"], kept["shape"]
        overall = count_decisions(prediction, shape, texture)
        if not overall.total:
            raise ValueError("no image has a shape and a texture of different classes: there is no conflict to look at")
        names, rows, by_class = [], [], []
        for label in shape.unique().tolist():
            part = shape == label
            found = count_decisions(prediction[part], shape[part], texture[part])
            names.append(self._names[label] if self._names else str(label))
            by_class.append(found.shape_bias)
            row: list[Cell] = (
                [names[-1], found.shape / found.total, found.texture / found.total] if found.total else [names[-1]]
            )
            rows.append([*row, *[None] * (3 - len(row)), found.shape_bias])
        figures = {
            "shape": overall.shape / overall.total,
            "texture": overall.texture / overall.total,
            "decided": overall.decided,
            "bias": overall.shape_bias,
        }
        notes = [] if overall.shape_bias is not None else ["No image was assigned to its shape or texture: there is no bias."]
        sheet = Sheet(
            "by class of the shape", ["class", "shape decisions", "texture decisions", "shape bias"], rows, share=True
        )
        curve = Lines("shape bias by class of the shape", "class", "shape bias", names, {"shape bias": by_class}, share=True)
        known = {key: value for key, value in figures.items() if value is not None}
        return Record("ShapeBias", self.name, "Shape or texture", known, [sheet], [curve], notes=notes)
