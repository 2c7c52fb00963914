"""Accuracy over the radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .record import Lines, Record, Sheet
from .units import SYMBOLS
from .wilson import interval

TOLERANCE = 0.01
"""Rises of the raw accuracy up to this share are taken for noise."""


@dataclass(frozen=True)
class Curve:
    """How many samples stand at each radius.

    Args:
        name: of the run or the network.
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radii, ascending, in units of the pixel range [0, 1].
        raw: how many samples are right under the attack at each radius.
        standing: how many stand at this radius and all smaller ones. A perturbation within a ball is one within every larger
            ball, so what was once broken stays broken.
        total: number of samples.
    """

    name: str
    norm: str
    eps: tuple[float, ...]
    raw: tuple[int, ...]
    standing: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, name: str, norm: str, eps: Sequence[float], right: Any) -> Curve:
        """The curve from verdicts.

        Args:
            name: see the class.
            norm: see the class.
            eps: radii in any order.
            right: whether each sample is right at each radius, bool (N, len(eps)).

        Raises:
            ValueError: if the shapes do not agree, a radius is given twice, or there is no sample.
        """
        right = np.asarray(right, dtype=bool)
        if right.ndim != 2 or right.shape[1] != len(eps) or not right.size:
            raise ValueError(f"right has the shape {right.shape}, and must have one column for each of the {len(eps)} radii")
        if len(set(map(float, eps))) < len(eps):
            raise ValueError(f"eps={list(map(float, eps))} holds a radius twice: name each once")
        order = np.argsort([float(e) for e in eps])
        right = right[:, order]
        return cls(
            name,
            norm,
            tuple(float(eps[i]) for i in order),
            tuple(right.sum(0).tolist()),
            tuple(np.logical_and.accumulate(right, axis=1).sum(0).tolist()),
            len(right),
        )

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share that stands at each radius, which never rises."""
        return tuple(count / self.total for count in self.standing)

    @property
    def raw_accuracy(self) -> tuple[float, ...]:
        """Share that is right under the attack at each radius."""
        return tuple(count / self.total for count in self.raw)

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """95 % interval of :attr:`accuracy` at each radius."""
        return tuple(interval(count, self.total) for count in self.standing)

    @property
    def rises(self) -> tuple[float, ...]:
        """Radii at which the raw accuracy is more than :data:`TOLERANCE` above that at some smaller one.

        A stronger attack that finds less is a sign of gradient masking (Carlini et al. 2019, arXiv 1902.06705).
        """
        lowest = np.minimum.accumulate(self.raw_accuracy)
        # Counts decide, so that rounding does not: 31 of 100 is not more than one per cent above 30.
        return tuple(e for e, a, low in zip(self.eps, self.raw_accuracy, lowest, strict=True) if a - low > TOLERANCE + 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """The curve for JSON."""
        return {
            "name": self.name,
            "norm": self.norm,
            "samples": self.total,
            "eps": list(self.eps),
            "raw": list(self.raw),
            "standing": list(self.standing),
            "accuracy": list(self.accuracy),
            "interval_95": [list(ends) for ends in self.intervals],
            "rises": list(self.rises),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Curve:
        """What :meth:`as_dict` gave, as a curve again."""
        counts = (tuple(stored[key]) for key in ("eps", "raw", "standing"))
        return cls(stored["name"], stored["norm"], *counts, stored["samples"])


def curve_record(name: str, curve: Curve) -> Record:
    """A robustness curve as the record of an analysis."""
    scale = 255 if curve.norm == "linf" else 1
    x = [round(scale * eps, 6) for eps in curve.eps]
    axis = f"{SYMBOLS.get(curve.norm, curve.norm)} radius" + (" in units of 1/255" if scale == 255 else "")
    lines = {"at this radius and all smaller ones": list(curve.accuracy)}
    if curve.raw != curve.standing:
        lines["at this radius alone"] = list(curve.raw_accuracy)
    ends = zip(curve.eps, curve.accuracy, curve.raw_accuracy, curve.intervals, strict=True)
    rows = [[f"{scale * eps:.4g}", stands, raw, low, high] for eps, stands, raw, (low, high) in ends]
    notes = ["A sample that is broken at one radius counts as broken at all larger ones. The interval is Wilson's, of 95 %."]
    if curve.rises:
        where = ", ".join(f"{scale * eps:.4g}" for eps in curve.rises)
        notes.append(f"The accuracy at a radius alone rises at {where}: check for gradient masking.")
    return Record(
        "RobustnessCurve",
        name,
        "Accuracy over the radius",
        sheets=[Sheet("Accuracy over the radius", [axis, "accuracy", "at this radius alone", "low", "high"], rows, share=True)],
        lines=[Lines("Accuracy over the radius", axis, "accuracy", x, lines, share=True)],
        about={"samples": curve.total, "norm": curve.norm},
        notes=notes,
    )
