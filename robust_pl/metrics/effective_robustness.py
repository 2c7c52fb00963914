"""How much better a network does under a shift than its accuracy without the shift lets expect."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

Pair = tuple[float, float]
"""Accuracy without and with the shift, in [0, 1]."""

SHIFTS: dict[str, str] = {
    "imagenet_v2": "imagenet",
    "imagenet_sketch": "imagenet",
    "stylized_imagenet": "imagenet",
    "imagenet_a": "imagenet_on_a",
    "imagenet_r": "imagenet_on_r",
    "objectnet": "imagenet_on_objectnet",
}
"""Shift -> what it is compared with: ImageNet's validation set, whole or on the classes of the shifted set."""


@dataclass(frozen=True)
class Baseline:
    """What accuracy under a shift is expected of accuracy without it: a line between logits (Taori et al. 2020, arXiv
    2007.00644).

    logit(acc_ood) = slope * logit(acc_id) + intercept. Effective robustness is what a network has above it.

    Args:
        slope: of the line.
        intercept: of the line.
        models: networks that it was fitted to.
        deviation: root mean square of what the accuracies of those differ from the line, in [0, 1].
    """

    slope: float
    intercept: float
    models: int
    deviation: float

    @classmethod
    def fit(cls, pairs: Iterable[Pair]) -> Baseline:
        """The line of least squares, in logits, through the accuracies of standard networks.

        Pairs with an accuracy of exactly 0 or 1, which has no logit, are left out.

        Args:
            pairs: accuracies in [0, 1] without and with the shift, one pair a network.

        Raises:
            ValueError: if an accuracy is none, or fewer than two networks with different accuracies are left.
        """
        known = [(_accuracy("acc_id", a), _accuracy("acc_ood", b)) for a, b in pairs]
        used = np.array([pair for pair in known if all(0 < value < 1 for value in pair)])
        if len(used) < 2 or len(np.unique(used[:, 0])) < 2:
            raise ValueError(
                f"{len(used)} pairs with accuracies between 0 and 1 fit no line: give at least two networks that differ"
            )
        x, y = np.log(used / (1 - used)).T
        slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
        line = cls(slope, intercept, len(used), 0.0)
        residual = [b - line.expected(a) for a, b in used.tolist()]
        return cls(slope, intercept, len(used), float(np.sqrt(np.mean(np.square(residual)))))

    def expected(self, acc_id: float) -> float:
        """Accuracy under the shift that standard networks have where they have ``acc_id`` without it."""
        acc_id = _accuracy("acc_id", acc_id)
        if acc_id in (0, 1):
            return acc_id if self.slope > 0 else 1 - acc_id
        return 1 / (1 + math.exp(-self.slope * math.log(acc_id / (1 - acc_id)) - self.intercept))

    def effective(self, acc_id: float, acc_ood: float) -> float:
        """Effective robustness, in [-1, 1]: accuracy under the shift minus what is expected."""
        return _accuracy("acc_ood", acc_ood) - self.expected(acc_id)


@dataclass(frozen=True)
class ShiftRow:
    """What a network does under one shift; accuracies in [0, 1].

    Args:
        shift: its name.
        acc_id: without it.
        acc_ood: with it.
        expected: of standard networks of that ``acc_id``; None where there is no baseline.
    """

    shift: str
    acc_id: float
    acc_ood: float
    expected: float | None = None

    @property
    def drop(self) -> float:
        """Accuracy that is lost, the measure of ImageNet-E (Li et al. 2023, arXiv 2303.17096)."""
        return accuracy_drop(self.acc_id, self.acc_ood)

    @property
    def effective(self) -> float | None:
        """Effective robustness."""
        return None if self.expected is None else self.acc_ood - self.expected


def accuracy_drop(acc_original: float, acc_edited: float) -> float:
    """Accuracy on original images minus that on what was made of them, in [-1, 1]."""
    return _accuracy("acc_original", acc_original) - _accuracy("acc_edited", acc_edited)


def shift_rows(measured: Mapping[str, Pair], baselines: Mapping[str, Baseline] | None = None) -> list[ShiftRow]:
    """One row a shift.

    Args:
        measured: shift -> accuracies without and with it.
        baselines: shift -> baseline; None takes :func:`standard_baseline` for the shifts that it knows.

    Raises:
        ValueError: if an accuracy is none.
    """
    known = {shift: standard_baseline(shift) for shift in SHIFTS if shift in measured} if baselines is None else baselines
    rows = []
    for shift, (acc_id, acc_ood) in measured.items():
        baseline = known.get(shift)
        acc_id, acc_ood = _accuracy("acc_id", acc_id), _accuracy("acc_ood", acc_ood)
        rows.append(ShiftRow(shift, acc_id, acc_ood, None if baseline is None else baseline.expected(acc_id)))
    return rows


def standard_pairs(shift: str) -> dict[str, Pair]:
    """Accuracies of 69 networks that were trained on ImageNet as usual: name -> without and with the shift.

    Published by Taori et al. 2020 (arXiv 2007.00644) in their testbed. ImageNet-A, -R and ObjectNet are compared with
    ImageNet's validation images of their own classes, which :class:`robust_pl.data.ImageNetSubsetDataModule` measures.

    Args:
        shift: a name of :data:`SHIFTS`.

    Raises:
        ValueError: if it is none.
    """
    if shift not in SHIFTS:
        raise ValueError(
            f"shift={shift!r} is unknown: choose one of {', '.join(SHIFTS)}, or fit a Baseline to pairs of your own"
        )
    return {row["model"]: (float(row[SHIFTS[shift]]) / 100, float(row[shift]) / 100) for row in _table()}


@cache
def standard_baseline(shift: str) -> Baseline:
    """The baseline of :func:`standard_pairs`.

    One line is a bad description of ImageNet-A: its images were chosen by a ResNet-50, and the networks below and above that
    lie on different lines, which ``deviation`` shows.
    """
    return Baseline.fit(standard_pairs(shift).values())


@cache
def _table() -> tuple[dict[str, str], ...]:
    text = files(__package__).joinpath("standard_models.csv").read_text("utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def _accuracy(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is no accuracy: give a share in [0, 1], not per cent")
    return float(value)
