"""Sections on analyses: any record is shown, whatever its kind, and those of several runs over and beside each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..record import Lines, Sheet
from .blocks import Cell, Fold, Grid, Picture, Row, Section, Text, any_cell, number
from .plots_html import color, curves, heat
from .run import Analysed, Run

_FEW = 8
"""Up to so many figures are columns, and runs rows; more of them are rows, and folded."""


@dataclass(frozen=True)
class Entry:
    """What a run says to an analysis."""

    label: str
    number: int
    found: Analysed


def analysis_sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each kind and name of an analysis and each data set."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for place, run in enumerate(runs):
        same = [(one.record.kind, one.record.name, one.data) for one in run.analyses]
        for key, one in zip(same, run.analyses, strict=True):
            label = run.label if same.count(key) == 1 else f"{run.label} · {one.folder}"
            groups.setdefault(key, []).append(Entry(label, place, one))
    several = len({data for _, _, data in groups}) > 1
    sections = []
    for (_, _, data), entries in sorted(groups.items()):
        title = entries[0].found.record.title
        sections.append(Section(f"{title} ({data})" if several else title, _section(entries)))
    return sections


def _section(entries: Sequence[Entry]) -> list[Any]:
    blocks: list[Any] = []
    differ = _differing([_flat(entry.found.record.about) for entry in entries])
    if differ:
        blocks.append(Text(f"Settings differ between runs: {', '.join(differ)}.", "warning"))
    figures = _figures(entries)
    blocks += [block for block in figures if block.kind == "grid"]
    drawn = [*_lines(entries), *_maps(entries)]
    pictures = [
        Picture(f"{title} – {entry.label}", f"{title}, of {entry.label}", png)  # noqa: RUF001
        for entry in entries
        for title, png in entry.found.pictures.items()
    ]
    blocks += [Row(part) for part in (drawn, pictures) if part]
    blocks += [*_sheets(entries), *(block for block in figures if block.kind == "fold")]
    notes = dict.fromkeys(note for entry in entries for note in entry.found.record.notes)
    blocks += [Text(note) for note in notes]
    blocks.append(Fold("Measured with", [_about(entries, differ)]))
    return blocks


def _figures(entries: Sequence[Entry]) -> list[Any]:
    names = list(dict.fromkeys(name for entry in entries for name in entry.found.record.figures))
    if not names:
        return []
    title = f"{entries[0].found.record.title}: figures"
    if len(names) <= _FEW:
        lines = [[_name(e), *(number(e.found.record.figures.get(name)) for name in names)] for e in entries]
        return [Grid(title, ["run", *names], lines)]
    lines = [[Cell(name), *(number(e.found.record.figures.get(name)) for e in entries)] for name in names]
    return [Fold(f"All {len(names)} figures", [Grid(title, ["figure", *(e.label for e in entries)], lines)])]


def _lines(entries: Sequence[Entry]) -> Iterator[Any]:
    """Curves of one title over each other where their axes agree."""
    for title, found in _titled(entries, "lines"):
        groups: dict[Any, list[tuple[Entry, Lines]]] = {}
        for entry, part in found:
            numeric = all(isinstance(x, int | float) for x in part.x)
            # Numbers have their place on any axis; names have it only among the same names.
            axis = (part.x_label, part.y_label, part.share, part.log_x, None if numeric else tuple(map(str, part.x)))
            groups.setdefault(axis, []).append((entry, part))
        for group in groups.values():
            series = []
            for entry, part in group:
                for dash, (name, values) in enumerate(part.lines.items()):
                    alone = len(part.lines) == 1 and len(entries) > 1
                    label = entry.label if alone else name if len(entries) == 1 else f"{entry.label}: {name}"
                    place = dash if len(entries) == 1 else entry.number
                    series.append((label, place, 0 if len(entries) == 1 else dash, part.x, values))
            first = group[0][1]
            said = title if len(groups) == 1 else f"{title} – {', '.join(e.label for e, _ in group)}"  # noqa: RUF001
            yield curves(said, first.x_label, first.y_label, series, first.share, first.log_x)


def _maps(entries: Sequence[Entry]) -> Iterator[Any]:
    """Heat maps of one title beside each other, with the same colours for the same values."""
    for title, found in _titled(entries, "maps"):
        values = [value for _, part in found for row in part.values for value in row if value is not None]
        limits = (min(values), max(values)) if values else None
        if limits is not None and all(part.share for _, part in found):
            limits = (0.0, min(1.0, math.ceil(5 * limits[1]) / 5))  # up to the next 20 %
        for entry, part in found:
            said = title if len(entries) == 1 else f"{title} – {entry.label}"  # noqa: RUF001
            yield heat(said, part.x_label, part.y_label, part.x, part.y, part.values, part.value_label, limits, part.share)


def _sheets(entries: Sequence[Entry]) -> Iterator[Any]:
    """Tables of one title and the same columns below each other in one."""
    for title, found in _titled(entries, "sheets"):
        groups: dict[tuple[str, ...], list[tuple[Entry, Sheet]]] = {}
        for entry, sheet in found:
            groups.setdefault(tuple(sheet.columns), []).append((entry, sheet))
        for columns, group in groups.items():
            lines = [[_name(e), *(any_cell(cell, sheet.share) for cell in row)] for e, sheet in group for row in sheet.rows]
            caption = f"{title}, shares in %" if group[0][1].share else title
            table = Grid(caption, ["run", *columns], lines)
            yield table if len(lines) <= 12 else Fold(caption, [table])


def _titled(entries: Sequence[Entry], kind: str) -> list[tuple[str, list[tuple[Entry, Any]]]]:
    found: dict[str, list[tuple[Entry, Any]]] = {}
    for entry in entries:
        for part in getattr(entry.found.record, kind):
            found.setdefault(part.title, []).append((entry, part))
    return list(found.items())


def _name(entry: Entry) -> Cell:
    return Cell(entry.label, color=color(entry.number))


def _about(entries: Sequence[Entry], differ: Sequence[str]) -> Grid:
    flat = [_flat(entry.found.record.about) for entry in entries]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    lines = [[Cell(key, best=key in differ), *(Cell(one.get(key, "")) for one in flat)] for key in keys]
    return Grid("Measured with; what differs is bold", ["setting", *(entry.label for entry in entries)], lines)


def _flat(about: Mapping[str, Any], before: str = "") -> dict[str, str]:
    found = {}
    for key, value in about.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = str(value)
    return found


def _differing(flat: Sequence[Mapping[str, str]]) -> list[str]:
    """What was asked differently; seconds always differ."""
    keys = dict.fromkeys(key for one in flat for key in one if key != "seconds" and not key.endswith("_seconds"))
    return [key for key in keys if len({one.get(key) for one in flat}) > 1]
