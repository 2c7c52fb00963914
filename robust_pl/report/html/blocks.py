"""What a section of the page is made of. Everything is text that the templates escape."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Of a table.

    Args:
        text: that is shown.
        value: by which columns are sorted; None takes the text, and an empty text comes last.
        best: shown in bold.
        small: shown below the text.
        color: of a mark before the text.
    """

    text: str
    value: float | str | None = None
    best: bool = False
    small: str = ""
    color: str = ""

    @property
    def key(self) -> str:
        """The value for the page's script."""
        value = self.text if self.value is None else self.value
        return repr(float(value)) if isinstance(value, int | float) else value


NOTHING = "–"  # noqa: RUF001
EMPTY = Cell(NOTHING, "")


@dataclass(frozen=True)
class Grid:
    """A sortable table, whose first column names the rows."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: str = "grid"

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and are aligned as such."""
        return [any(isinstance(row[k].value, float | int) for row in self.rows) for k in range(len(self.headings))]


@dataclass(frozen=True)
class Plot:
    """A plot: the JSON of a plotly figure, and what it shows in words for those who do not see it."""

    title: str
    figure: str
    alt: str
    height: int
    wide: bool = False
    kind: str = "plot"


@dataclass(frozen=True)
class Picture:
    """A picture that is part of the page."""

    title: str
    alt: str
    png: bytes
    kind: str = "picture"

    @property
    def uri(self) -> str:
        """The picture as an address that holds it."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Text:
    """A paragraph; ``kind`` is ``text``, or ``warning`` where readers must not miss it."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Code:
    """Lines of a file, each with a class: ``add``, ``del``, ``at`` or none."""

    label: str
    lines: Sequence[tuple[str, str]]
    kind: str = "code"


@dataclass(frozen=True)
class Row:
    """Blocks beside each other, where there is room."""

    blocks: Sequence[Any]
    kind: str = "row"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: Sequence[Any]
    kind: str = "fold"


@dataclass(frozen=True)
class Section:
    """A part of the page that its navigation names."""

    title: str
    blocks: Sequence[Any] = field(default_factory=list)
    anchor: str = ""


def anchored(sections: Sequence[Section]) -> list[Section]:
    """Sections with anchors of their own."""
    found: dict[str, Section] = {}
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        anchor, number = name, 1
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found[anchor] = Section(section.title, section.blocks, anchor)
    return list(found.values())


def per_cent(share: float | None, best: bool = False, small: str = "") -> Cell:
    """A share in per cent."""
    return EMPTY if share is None or math.isnan(share) else Cell(f"{100 * share:.2f}", 100 * share, best, small)


def number(value: float | None, best: bool = False) -> Cell:
    """Any other number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return EMPTY
    whole = isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e7)
    return Cell(f"{int(value):,}" if whole else f"{value:.4g}", value, best)


def any_cell(value: Any, share: bool = False) -> Cell:
    """A cell of a record: text, number or nothing."""
    if value is None:
        return EMPTY
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(str(value))
    return per_cent(value) if share else number(value)
