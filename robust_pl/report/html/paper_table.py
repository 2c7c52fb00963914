"""The table for papers: a row for each network, the mean over seeds where there are several, and the best in bold."""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..markdown import rows as markdown_rows
from ..record import Record
from ..summary import CLEAN, WORST
from .contenders import Contender, contenders, data_sets, verdicts
from .run import Run

# Where a run lies and what is done after it, and what changes no result.
_ELSEWHERE = ("run", "report", "evaluation", "ckpt_path")
_NO_MATTER = ("seed", "seed_everything", "enable_progress_bar", "enable_model_summary", "logger", "data_dir", "num_workers")
_CORRUPTIONS = {"mean": ("corruptions", 1), "mce": ("mCE", -1), "relative_mce": ("relative mCE", -1)}
_ASKED = ("settings", "images", "parameters", "samples")
_SAID = {CLEAN: "clean", WORST: "worst"}


@dataclass(frozen=True)
class PaperColumn:
    """A column.

    Args:
        heading: above it.
        better: 1 where the highest is best, -1 where the lowest is, 0 where none is.
        share: numbers are shares, shown in per cent.
    """

    heading: str
    better: int = 1
    share: bool = True

    def shown(self, values: Sequence[float]) -> str:
        """The mean of seeds, and their standard deviation where there are several; empty without values."""
        if not values:
            return ""
        scale, digits, few = (100, ".2f", ".2f") if self.share else (1, ".3g", ".2g")
        mean = format(scale * statistics.mean(values), digits)
        return mean if len(values) < 2 else f"{mean} ± {format(scale * statistics.stdev(values), few)}"


@dataclass(frozen=True)
class PaperTable:
    """Networks that were trained for one data set.

    Args:
        data: its name.
        columns: in order.
        rows: label, and for each column the values of all seeds.
        seeds: number of runs behind each row.
        notes: sentences below it.
    """

    data: str
    columns: list[PaperColumn]
    rows: list[tuple[str, list[list[float]]]]
    seeds: list[int]
    notes: list[str] = field(default_factory=list)

    def best(self, place: int) -> set[int]:
        """Rows that are best in a column, as far as the digits that are shown tell; none where nothing is compared."""
        column = self.columns[place]
        means = {k: statistics.mean(values[place]) for k, (_, values) in enumerate(self.rows) if values[place]}
        if not column.better or len(means) < 2:
            return set()
        top = max(means.values(), key=lambda mean: column.better * mean)
        return {k for k, mean in means.items() if column.shown([mean]) == column.shown([top])}

    def cells(self) -> list[list[tuple[str, bool]]]:
        """For each row and column the text, and whether it is best."""
        best = [self.best(place) for place in range(len(self.columns))]
        return [
            [(column.shown(values[j]), k in best[j]) for j, column in enumerate(self.columns)]
            for k, (_, values) in enumerate(self.rows)
        ]

    def as_markdown(self) -> str:
        """A table that GitHub and pandoc show."""
        lines = []
        for (label, _), cells in zip(self.rows, self.cells(), strict=True):
            lines.append([_plain(label), *(f"**{text}**" if best else text for text, best in cells)])
        headings = [_plain(self.data), *(_plain(column.heading) for column in self.columns)]
        return f"{markdown_rows(headings, lines, 1)}\n\n{' '.join(_plain(note) for note in self.notes)}"


def paper_markdown(runs: Sequence[Run]) -> str:
    """All tables below each other."""
    return "\n\n".join(table.as_markdown() for table in paper_tables(runs)) + "\n"


def paper_tables(runs: Sequence[Run]) -> list[PaperTable]:
    """A table for each data set that networks were trained for."""
    rows = contenders(runs)
    tables = []
    for data in data_sets(rows):
        group = [row for row in rows if row.run.trained_on == data]
        if group:
            tables.append(_table(data, group, [name for name in data_sets(group) if name != data]))
    return tables


def _table(data: str, rows: Sequence[Contender], others: Sequence[str]) -> PaperTable:
    measured: dict[int, dict[PaperColumn, float]] = {k: {} for k in range(len(rows))}
    columns: dict[PaperColumn, None] = {}

    def put(row: Contender, column: PaperColumn, value: float) -> None:
        columns.setdefault(column)
        measured[rows.index(row)].setdefault(column, value)

    judged = verdicts(rows, data)
    for name in judged.columns:
        for row, right in judged.right:
            if name in right:
                put(row, PaperColumn(_SAID.get(name, name)), float(right[name].mean()))
    for row in rows:
        for column, value in _corruptions(row):
            put(row, column, value)
    for other in others:
        for row, right in verdicts(rows, other).right:
            put(row, PaperColumn(f"on {other}"), float(right[CLEAN].mean()))
    for row in rows:
        for view in row.run.views if not row.suffix else []:
            put(row, PaperColumn(f"views: {view.name}"), view.right / view.views)
    for row in rows:
        if row.run.cost:
            put(row, PaperColumn("training hours", 0, False), row.run.cost["device_hours"])
    groups = _groups(rows)
    lines = []
    for group in groups:
        values = [[measured[k][column] for k in group if column in measured[k]] for column in columns]
        lines.append((_label([rows[k] for k in group]), values))
    seeds = list(map(len, groups))
    return PaperTable(data, list(columns), lines, seeds, _notes(judged.right, seeds) + _corruption_notes(rows))


def _corruptions(row: Contender) -> list[tuple[PaperColumn, float]]:
    found = []
    for record in _corruption_records(row):
        known = {key: record.figures.get(key) for key in _CORRUPTIONS}
        found += [(PaperColumn(*_CORRUPTIONS[key]), value) for key, value in known.items() if value is not None]
    return found


def _corruption_records(row: Contender) -> list[Record]:
    """What analyses found, which look at raw weights."""
    found = []
    for run in row.runs:
        folders = [test.folder for test in run.tests if not test.weights and any(test is own for own in row.tests)]
        found += [one.record for one in run.analyses if one.record.kind == "Corruptions" and one.folder in folders]
    return found


def _corruption_notes(rows: Sequence[Contender]) -> list[str]:
    """A sentence, where the first record of each row was not measured in the same way."""
    asked = [json.dumps([found[0].about.get(key) for key in _ASKED]) for row in rows if (found := _corruption_records(row))]
    return ["Corruptions were not measured alike, see the settings of that analysis."] if len(set(asked)) > 1 else []


def _notes(right: Sequence[tuple[Contender, Mapping[str, Any]]], seeds: Sequence[int]) -> list[str]:
    sizes = sorted({len(found[CLEAN]) for _, found in right})
    notes = [f"Accuracy in % of {' or '.join(f'{size:,}' for size in sizes)} test samples."] if sizes else []
    if len(sizes) > 1:
        notes.append("Rows were not measured on the same samples.")
    if max(seeds) > 1:
        counts = sorted({n for n in seeds if n > 1})
        notes.append(f"Mean ± standard deviation over {' or '.join(map(str, counts))} seeds where there are several.")
    return notes


def _groups(rows: Sequence[Contender]) -> list[list[int]]:
    """Places of rows that differ in nothing but the seed. The same seed twice is no second seed."""
    groups: dict[tuple[str, int], list[int]] = {}
    times: dict[tuple[str, int | None], int] = {}
    for k, row in enumerate(rows):
        config = {key: value for key, value in row.run.config.items() if key not in _ELSEWHERE}
        known = "trainer" in config and "model" in config and row.run.seed is not None
        name = json.dumps([_bare(config), row.suffix], sort_keys=True, default=str) if known else f"{k}"
        again = times[name, row.run.seed] = times.get((name, row.run.seed), -1) + 1
        groups.setdefault((name, again), []).append(k)
    return list(groups.values())


def _bare(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {key: _bare(value) for key, value in config.items() if key not in _NO_MATTER}
    return [_bare(value) for value in config] if isinstance(config, list) else config


def _label(rows: Sequence[Contender]) -> str:
    """What the names of seeds have in common, without the seed's number."""
    if len(rows) == 1:
        return rows[0].label
    names = [re.sub(r"[-_ .]*(?:seed|s)?[-_]?\d+$", "", row.run.label) for row in rows]
    name = names[0] if len(set(names)) == 1 and names[0] else rows[0].run.label
    return " · ".join(filter(None, (name, rows[0].suffix)))


def _plain(text: str) -> str:
    return html.escape(text, quote=False)
