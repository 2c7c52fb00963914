"""Paired comparisons of two methods, over seeds and over samples. Pure functions of numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from robust_pl.functional.fairness import nsd, worst_class

CONFIDENCE, RESAMPLES = 0.95, 10_000


@dataclass(frozen=True)
class Difference:
    """What one method has and another, how far apart they are, and the 95 % interval of that; nan where there is none."""

    ours: float
    theirs: float
    difference: float
    low: float
    high: float

    def text(self, digits: int = 1) -> str:
        """The difference, with its interval where there is one."""
        low, high = (f"{end:+.{digits}f}" for end in (self.low, self.high))
        return f"{self.difference:+.{digits}f}" + ("" if np.isnan(self.low) else f" [{low}, {high}]")


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean difference of the same seeds, with the interval of Student's t; nan for a single seed.

    Raises:
        ValueError: if the numbers of seeds differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} seeds of one method and {len(theirs)} of the other cannot be paired: run the same ones")
    each = np.asarray(ours) - np.asarray(theirs)
    half = float("nan")
    if len(each) > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))
    middle = float(each.mean())
    return Difference(float(np.mean(ours)), float(np.mean(theirs)), middle, middle - half, middle + half)


def over_samples(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, Difference]:
    """Accuracy, worst class and NSD of two methods on the same samples, with intervals of the stratified bootstrap.

    Both methods get the same 10,000 resamples, drawn with replacement within each class, and the interval is that of the
    percentiles of the difference. Each method's worst class is sought in each resample anew. The interval covers which samples
    were drawn, and not which weights training began from.

    Args:
        ours: share of seeds in which the sample is right (N,), in [0, 1].
        theirs: likewise of the other method.
        labels: classes (N,).
        seed: of the resamples.

    Returns:
        By figure; accuracies in percent, NSD as it is.

    Raises:
        ValueError: if the shapes do not agree.
    """
    if not ours.shape == theirs.shape == labels.shape:
        raise ValueError(
            f"samples cannot be paired: {ours.shape} of one method, {theirs.shape} of the other, {labels.shape} labels"
        )
    both = np.stack([ours, theirs]).astype(np.float64)
    shares = torch.from_numpy(np.bincount(labels)[np.unique(labels)] / len(labels))
    whole, drawn = torch.from_numpy(by_class(both, labels)), torch.from_numpy(resampled(both, labels, seed))
    figures: dict[str, Callable[[Tensor], Tensor]] = {
        "accuracy": lambda accuracy: 100 * (accuracy * shares).sum(-1),
        "worst class": lambda accuracy: 100 * worst_class(accuracy),
        "NSD": nsd,
    }
    found = {}
    for name, figure in figures.items():
        first, second = figure(whole).tolist()
        gaps = np.subtract(*figure(drawn).numpy())
        gaps = gaps[~np.isnan(gaps)] if not np.isnan(first - second) else gaps[:1] * np.nan
        low, high = np.percentile(gaps, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        found[name] = Difference(first, second, first - second, float(low), float(high))
    return found


def by_class(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean of verdicts (..., N) over the samples of each class that occurs, (..., K), ascending."""
    return np.stack([right[..., labels == label].mean(-1) for label in np.unique(labels)], -1)


def resampled(right: np.ndarray, labels: np.ndarray, seed: int, count: int = RESAMPLES) -> np.ndarray:
    """Class accuracies (M, count, K) of verdicts (M, N) in resamples that all M share; classes keep their sizes."""
    draws, found = np.random.default_rng(seed), []
    for label in np.unique(labels):
        of_class = right[:, labels == label]
        found.append(of_class[:, draws.integers(of_class.shape[1], size=(count, of_class.shape[1]))].mean(-1))
    return np.stack(found, -1)


@dataclass(frozen=True)
class Verdicts:
    """Outcome of every sample of a test.

    Args:
        index: number of each sample in the test set (N,).
        labels: classes (N,).
        right: by ``clean`` and each attack, bool (N,); or shares of seeds.
    """

    index: np.ndarray
    labels: np.ndarray
    right: dict[str, np.ndarray]

    @classmethod
    def read(cls, table: Path) -> Verdicts:
        """From the ``predictions.csv`` of a test."""
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: np.array([int(row[name]) for row in rows]) for name in ("index", "label", "prediction")}
        attacks = [name for name in rows[0] if name.startswith("right_")]
        right = {"clean": columns["prediction"] == columns["label"]}
        right |= {name.removeprefix("right_"): np.array([row[name] == "1" for row in rows]) for name in attacks}
        return cls(columns["index"], columns["label"], right)

    def figures(self) -> dict[str, float]:
        """Of each verdict accuracy and worst class in percent, NSD, and of each attack the mean with the clean accuracy."""
        found = {}
        for name, right in self.right.items():
            of_classes = torch.from_numpy(by_class(right.astype(np.float64), self.labels))
            found[name] = 100 * float(right.mean())
            found[f"worst_{name}"] = 100 * worst_class(of_classes).item()
            found[f"nsd_{name}"] = nsd(of_classes).item()
            if name != "clean":
                found[f"mean_{name}"] = (found["clean"] + found[name]) / 2
        return found
