"""How often a network is right, by where the camera stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .wilson import interval

HEADINGS = ("azimuth_from", "azimuth_to", "elevation_from", "elevation_to", "views", "right", "accuracy", "low", "high")
"""Columns of :meth:`ViewBins.rows`; ``low`` and ``high`` are the ends of the 95 % interval."""


@dataclass(frozen=True)
class ViewBins:
    """Views counted in R x C fields of the view sphere, by elevation and azimuth.

    Args:
        azimuth: edges of the fields in degrees, ascending, (C + 1,).
        elevation: edges in degrees, ascending, (R + 1,).
        total: number of views, int (R, C).
        right: of those, how many the network gets right, (R, C).
    """

    azimuth: np.ndarray
    elevation: np.ndarray
    total: np.ndarray
    right: np.ndarray

    @classmethod
    def count(
        cls,
        azimuth: Any,
        elevation: Any,
        right: Any,
        columns: int = 12,
        rows: int = 12,
        elevations: tuple[float, float] = (-90.0, 90.0),
    ) -> ViewBins:
        """Count views into equal fields, of 30 x 15 degrees by default. A view on an edge belongs to the field above it.

        Args:
            azimuth: in degrees in [-180, 180], (V,).
            elevation: in degrees in [-90, 90], (V,).
            right: whether the network is, (V,).
            columns: C.
            rows: R.
            elevations: lowest and highest edge; views outside are not counted.

        Raises:
            ValueError: if the shapes differ, or there is no field.
        """
        where = [np.asarray(values, dtype=float).ravel() for values in (azimuth, elevation, right)]
        if len({len(values) for values in where}) > 1:
            raise ValueError(f"{', '.join(str(len(v)) for v in where)} azimuths, elevations and verdicts: give as many of each")
        if columns < 1 or rows < 1 or not -90 <= elevations[0] < elevations[1] <= 90:
            raise ValueError(f"{columns} x {rows} fields at elevations {elevations} are none: take 12 x 12 in (-90, 90)")
        edges = np.linspace(-180, 180, columns + 1), np.linspace(*elevations, rows + 1)
        total, _, _ = np.histogram2d(where[1], where[0], bins=edges[::-1])
        good, _, _ = np.histogram2d(where[1], where[0], bins=edges[::-1], weights=where[2])
        return cls(*edges, total.astype(int), good.round().astype(int))

    @property
    def accuracy(self) -> np.ndarray:
        """Share that is right, (R, C); NaN where nothing was seen."""
        return np.divide(self.right, self.total, out=np.full(self.total.shape, np.nan), where=self.total > 0)

    @property
    def covered(self) -> int:
        """Number of fields that hold a view."""
        return int((self.total > 0).sum())

    @property
    def mean(self) -> float:
        """Accuracy over the part of the sphere that was seen: fields count by their area, so the poles do not count more."""
        area = np.diff(np.sin(np.deg2rad(self.elevation)))[:, None] * (self.total > 0)
        return float((area * np.nan_to_num(self.accuracy)).sum() / area.sum()) if self.covered else float("nan")

    @property
    def worst(self) -> tuple[int, int]:
        """Row and column of the field of the lowest accuracy; of equal ones that with most views, then the first.

        Raises:
            ValueError: if there is no view.
        """
        if not self.covered:
            raise ValueError("no view was counted, so no field is the worst")
        shares = np.where(self.total > 0, self.accuracy, np.inf).ravel()
        row, column = divmod(int(np.lexsort((-self.total.ravel(), shares))[0]), self.total.shape[1])
        return row, column

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """A row for each field, see :data:`HEADINGS`, from below and from -180 degrees on; no shares where nothing was seen."""
        for (i, j), total in np.ndenumerate(self.total):
            edges = (*self.azimuth[j : j + 2].tolist(), *self.elevation[i : i + 2].tolist())
            right = int(self.right[i, j])
            shares = (right / total, *interval(right, int(total))) if total else ("", "", "")
            yield (*edges, int(total), right, *shares)
