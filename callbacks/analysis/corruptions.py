"""Accuracy under common corruptions."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...functional.corruptions.apply import check_corruptions, corrupt, table_for
from ...functional.corruptions.tables import BENCHMARK, CORRUPTIONS, EXTRA, SEVERITIES, Table
from ...report.record import HeatMap, Record
from .base import Analysis
from .corruption_baseline import Baseline
from .corruption_files import CorruptedFiles, open_files
from .corruption_sheets import accuracy_sheet, error_sheet

_SETS: dict[str, tuple[str, ...]] = {"benchmark": BENCHMARK, "extra": EXTRA, "all": CORRUPTIONS}


class Corruptions(Analysis):
    """Accuracy under the common corruptions of Hendrycks and Dietterich (2019, arXiv 1903.12261), and its corruption error.

    Test images, of three channels, are corrupted as :func:`robust_pl.functional.corruptions.corrupt` does, or read from the
    files of CIFAR-10-C, CIFAR-100-C or ImageNet-C. The record holds a heat map of accuracies, corruption by severity; their
    mean over the 15 corruptions of the benchmark; and corruption errors (CE): the error under a corruption, summed over
    severities, divided by that of a baseline, where there is one. mCE is their mean, and relative mCE that of the errors'
    growth over the clean one. The baseline is AlexNet on ImageNet, for all 15 corruptions and 5 severities with the parameters
    of 224 pixels; or another run, for any images.

    Cost: one forward pass of a sample for each corruption and severity, and one clean: 76 for the benchmark; and what making
    the images costs, see ``benchmarks/corruptions.py``.

    Args:
        corruptions: the 15 of the ``benchmark``, the 4 ``extra`` ones, ``all``, or a list of names.
        severities: of 1 to 5.
        table: parameters, those of ``cifar`` or of ``imagenet``; None takes those of ``cifar`` for images whose shorter side is
            less than 96 pixels.
        files: folder of published images to read in place of making them: that of CIFAR-10-C or CIFAR-100-C with its
            ``labels.npy`` and an array for each corruption, or that of ImageNet-C's folders
            ``<corruption>/<severity>/<class>/<file>``. They must belong to the test set.
        reference: record of another run, such as ``runs/standard/analysis/test/corruptions.json``, whose errors are the
            baseline.
        seed: of the random numbers of the corruptions.
        samples: only those at a position in the test set below this are looked at; None for all.
        name: of figures and files; None takes the class's.
        folder: where a run's files go; None takes ``analysis/<folder of the test>`` in the run folder.

    Raises:
        ValueError: if an argument is unknown; and in the test, if images, files or reference do not fit.
        FileNotFoundError: in the test, if files are missing.
    """

    def __init__(
        self,
        corruptions: Literal["benchmark", "extra", "all"] | list[str] = "benchmark",
        severities: list[int] | None = None,
        table: Table | None = None,
        files: str | None = None,
        reference: str | None = None,
        seed: int = 0,
        samples: int | None = None,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(samples, name, folder)
        if isinstance(corruptions, str):
            if corruptions not in _SETS:
                raise ValueError(f"corruptions={corruptions!r} must be benchmark, extra, all, or a list of names")
            corruptions = list(_SETS[corruptions])
        severities = list(SEVERITIES) if severities is None else severities
        check_corruptions(corruptions, severities)
        for key, values in (("corruptions", corruptions), ("severities", severities)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key}={values} must name at least one, and each once")
        if table not in (None, "cifar", "imagenet"):
            raise ValueError(f"table={table!r} is unknown: choose cifar or imagenet")
        if files is not None and table is not None:
            raise ValueError(f"table={table} has no effect on files={files}: leave one of them out")
        self.corruptions, self.severities, self.table = list(corruptions), list(severities), table
        self.files, self.reference, self.seed = files, reference, seed
        self._classes: int | None = None
        self._size: tuple[int, ...] = ()
        self._source: CorruptedFiles | None = None
        self._baseline: Baseline | None = None

    def begin(self, model: nn.Module, data: Any) -> None:
        self._classes = getattr(data, "num_classes", None)
        self._size = tuple(getattr(data, "image_shape", ()))
        if self._size and self._size[0] != 3:
            raise ValueError(
                f"Corruptions needs colour images, and {type(data).__name__} has images of {self._size[0]} channels: leave it "
                "out"
            )
        self._baseline = None if self.reference is None else Baseline.of_record(Path(self.reference))
        if self._baseline is not None:
            self._baseline.mean_errors(self.corruptions, self.severities)  # refuses what it has not
        self._source = None
        if self.files is not None:
            self._source = open_files(Path(self.files), self.corruptions, self.severities, data)

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        logits = self.ask(model, x)
        self._size, self._classes = tuple(x.shape[1:]), logits.shape[1]
        right = [logits.argmax(1) == y]
        for name in self.corruptions:
            for severity in self.severities:
                right.append(self.ask(model, self._corrupted(x, y, name, severity, index)).argmax(1) == y)
        self.keep(right=torch.stack(right, 1))

    def _corrupted(self, x: Tensor, y: Tensor, name: str, severity: int, index: Tensor) -> Tensor:
        if self._source is None:
            return corrupt(x, name, severity, index, self.seed, self.table)
        return self._source.pixels(name, severity, index, y).to(x)

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        shares = kept["right"].double().mean(0)
        clean = shares[0].item()
        table = shares[1:].view(len(self.corruptions), len(self.severities)).tolist()
        accuracy = dict(zip(self.corruptions, table, strict=True))
        figures = {"clean": clean, **self._means(accuracy)}
        notes = self._notes()
        sheets = [accuracy_sheet(accuracy, self.severities)]
        baseline = self._baseline or self._alexnet()
        if baseline is not None:
            errors = {name: [1 - share for share in row] for name, row in accuracy.items()}
            means = baseline.mean_errors(self.corruptions, self.severities)
            sheet, found = error_sheet(errors, 1 - clean, means, baseline.clean_error, baseline.title)
            sheets.append(sheet)
            figures |= found
            notes += baseline.notes
        heat = HeatMap(
            f"accuracy (clean: {100 * clean:.1f} %)",
            "severity",
            "corruption",
            list(self.severities),
            list(self.corruptions),
            table,
            share=True,
            value_label="accuracy",
        )
        about = {"images": "generated" if self.files is None else self.files, "parameters": self._table()}
        return Record("Corruptions", self.name, "Common corruptions", figures, sheets, [], [heat], {}, about, notes)

    def _means(self, accuracy: dict[str, list[float]]) -> dict[str, float]:
        """Means over the corruptions of the benchmark, and over the others, as far as they are there; and of each."""
        means = {name: fmean(row) for name, row in accuracy.items()}
        parts = {"mean": [means[name] for name in BENCHMARK if name in means]}
        parts["mean_extra"] = [means[name] for name in EXTRA if name in means]
        return {**{key: fmean(values) for key, values in parts.items() if values}, "worst": min(means.values()), **means}

    def _table(self) -> Table | None:
        return self.table or (table_for(self._size[-2:]) if self._size else None)

    def _alexnet(self) -> Baseline | None:
        whole = set(self.corruptions) == set(BENCHMARK) and set(self.severities) == set(SEVERITIES)
        return Baseline.alexnet(self._classes, self._size[-2:]) if whole and self._table() == "imagenet" else None

    def _notes(self) -> list[str]:
        if self.files is not None:
            return []
        return [
            "Images were corrupted on the fly, with other random numbers than the published files; frost, snow, motion blur "
            "and spatter are reconstructed. Compare with other runs of this analysis rather than with published figures."
        ]
