"""What an analysis found, as plain data: the one form that analyses write, and that plots and reports read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True)
class Sheet:
    """A table.

    Args:
        title: above it.
        columns: headings.
        rows: of as many cells; None is a missing one.
        share: numbers are shares in [0, 1], which are shown in per cent.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    share: bool = False


@dataclass(frozen=True)
class Lines:
    """Curves over one axis.

    Args:
        title: above them.
        x_label: with its unit.
        y_label: with its unit.
        x: places, numbers or names.
        lines: name -> values, one for each place; None is a missing one.
        share: values are shares in [0, 1], which are shown in per cent.
        log_x: draw the axis logarithmically.
    """

    title: str
    x_label: str
    y_label: str
    x: list[Any]
    lines: dict[str, list[float | None]]
    share: bool = False
    log_x: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values over two axes; the first row is the upper one.

    Args:
        title: above it.
        x_label: of the columns.
        y_label: of the rows.
        x: of each column, numbers or names.
        y: of each row.
        values: rows of values; None is a missing one.
        share: values are shares in [0, 1], which are shown in per cent.
        value_label: what the values are.
    """

    title: str
    x_label: str
    y_label: str
    x: list[Any]
    y: list[Any]
    values: list[list[float | None]]
    share: bool = False
    value_label: str = ""


@dataclass(frozen=True)
class Record:
    """What one analysis found on one data set.

    Args:
        kind: class of the analysis, such as ``Corruptions``.
        name: first part of its figures' names, and name of its files.
        title: for people.
        figures: name -> number, as they are logged (``test/<name>_<figure>``).
        sheets: tables.
        lines: curves.
        maps: heat maps.
        pictures: title -> path of a PNG, relative to the record's file.
        about: what it was measured on and with: data, samples, settings, passes, seconds.
        notes: sentences that a reader of the figures needs.
    """

    kind: str
    name: str
    title: str
    figures: dict[str, float] = field(default_factory=dict)
    sheets: list[Sheet] = field(default_factory=list)
    lines: list[Lines] = field(default_factory=list)
    maps: list[HeatMap] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a file.

        Raises:
            ValueError: if the file holds none.
        """
        try:
            stored = json.loads(Path(path).read_text())
            parts = {"sheets": Sheet, "lines": Lines, "maps": HeatMap}
            return cls(
                **{key: [parts[key](**one) for one in value] if key in parts else value for key, value in stored.items()}
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no record of an analysis: {error}") from None
