"""Sections on accuracy: clean and under attack, for each data set, and by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...functional import fairness
from ..classes import Classes, class_name
from ..summary import CLEAN, WORST
from ..units import SYMBOLS, radius
from ..wilson import interval
from .blocks import EMPTY, Cell, Fold, Grid, Heading, Section, Text, number, per_cent
from .contenders import Contender, Verdicts, contenders, data_sets, verdicts
from .plots_html import bars, color, heat
from .run import Run, Tested, short

_ATTACK = (
    *("network", "attack", "class", "norm", "eps", "steps", "accuracy", "worst so far"),
    *("forward", "backward", "seconds", "further settings"),
)
_SHOWN = {"class", "norm", "eps", "steps", "seconds"}
_CLASSES = 50
"""Of more classes those that fare worst are drawn; the table holds all."""


def accuracy_sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each data set, those of trainings first."""
    rows = contenders(runs)
    return [Section(f"Accuracy on {data}", _accuracy(data, verdicts(rows, data))) for data in data_sets(rows)]


def name_cell(row: Contender) -> Cell:
    """The label of a network, with the colour of its run."""
    return Cell(row.label, color=color(row.number))


def _accuracy(data: str, judged: Verdicts) -> list[Any]:
    series, lines = [], []
    for row, right in judged.right:
        found = {name: _share(right[name]) for name in judged.columns if name in right}
        series.append((row.label, row.number, [_in_per_cent(found.get(name)) for name in judged.columns]))
        cells = [EMPTY if name not in found else _with_interval(*found[name]) for name in judged.columns]
        lines.append([name_cell(row), number(len(right[CLEAN])), *cells])
    lines = with_best(lines, range(2, 2 + len(judged.columns)))
    blocks: list[Any] = [bars(f"Accuracy on {data}", judged.columns, series)]
    blocks.append(Grid(f"Accuracy in % on {data}, with 95 % intervals", ["network", "samples", *judged.columns], lines))
    blocks.append(Text((_WORST if WORST in judged.columns else "") + _INTERVALS))
    seen = [row.on(data)[0].table.columns["index"] for row, _ in judged.right]
    if any(not np.array_equal(index, seen[0]) for index in seen):
        blocks.append(Text("These networks were not tested on the same samples.", "warning"))
    if len({tuple(n for n in right if n != WORST) for _, right in judged.right}) > 1:
        blocks.append(Text(f"Not every network met every attack, so {WORST} is not the same question for all.", "warning"))
    for row, _ in judged.right:
        blocks += _flags(row, row.on(data))
    attacks = [line for row, _ in judged.right for test in row.on(data) for line in _attacks(row, test)]
    if attacks:
        table = Grid("Attacks and what they cost; passes are per sample", _ATTACK, attacks)
        blocks.append(Fold("Attacks: settings and cost", [table]))
    return blocks


_WORST = f"{WORST}: right when clean and under every attack of this table, sample by sample. "
_INTERVALS = "The intervals (Wilson) cover the choice of samples, not attacks that were not tried."


def _share(right: np.ndarray) -> tuple[int, int]:
    return int(right.sum()), len(right)


def _in_per_cent(found: tuple[int, int] | None) -> tuple[float, float, float] | None:
    if found is None:
        return None
    low, high = interval(*found)
    return 100 * found[0] / found[1], 100 * low, 100 * high


def _with_interval(right: int, total: int) -> Cell:
    low, high = interval(right, total)
    return per_cent(right / total, small=f"{100 * low:.2f} to {100 * high:.2f}")


def with_best(lines: list[list[Cell]], places: Sequence[int], better: int = 1) -> list[list[Cell]]:
    """The same table with the best of each column marked; nothing where only one row has a number."""
    for place in places:
        values = [line[place].value for line in lines if isinstance(line[place].value, float)]
        if len(values) > 1:
            top = max(values) if better > 0 else min(values)
            for line in lines:
                if line[place].value == top:
                    line[place] = replace(line[place], best=True)
    return lines


def _attacks(row: Contender, test: Tested) -> list[list[Cell]]:
    lines = []
    for line in test.lines[1:]:
        about = test.table.about(line.name) if not line.part and line.name != WORST else {}
        norm, steps = about.get("norm"), about.get("steps")
        further = ", ".join(f"{key}={value}" for key, value in about.items() if key not in _SHOWN)
        described = (short(about.get("class")), SYMBOLS.get(norm, norm or ""), radius(about.get("eps"), norm))
        shares = (line.accuracy, line.standing / line.total)
        lines.append(
            [
                name_cell(row),
                Cell(f"… after {line.name}" if line.part else line.name),
                *(Cell(text) for text in described),
                EMPTY if steps is None else number(steps),
                *(per_cent(share) for share in shares),
                *(
                    number(None if spent is None else round(spent, 2))
                    for spent in (line.forwards, line.backwards, line.seconds)
                ),
                Cell(further),
            ]
        )
    return lines


def _flags(row: Contender, tests: Sequence[Tested]) -> list[Any]:
    blocks: list[Any] = []
    for test in tests:
        flags = test.table.meta.get("flags") or []
        raised = [flag for flag in flags if flag.get("raised")]
        said = f"{row.label}: {len(raised)} of {len(flags)} checks for gradient masking raised"
        if flags:
            ordered = [*raised, *(flag for flag in flags if not flag.get("raised"))]
            lines = [
                [
                    Cell(str(flag.get("name", ""))),
                    Cell("yes" if flag.get("raised") else "no"),
                    number(flag.get("value")),
                    Cell(str(flag.get("message", ""))),
                ]
                for flag in ordered
            ]
            table = Grid(said, ["check", "raised", "value", "meaning"], lines)
            blocks += [Text(f"{said}: its accuracies may be too high.", "warning")] if raised else []
            blocks.append(Fold(f"Checks for gradient masking of {row.label}", [table]))
    return blocks


# Classes -------------------------------------------------------------------------------------------------------------


def class_sections(runs: Sequence[Run]) -> list[Section]:
    """How classes fare, on all data sets of at least two classes."""
    blocks: list[Any] = []
    rows = contenders(runs)
    for data in data_sets(rows):
        tested = [(row, test) for row in rows for test in row.on(data)]
        if len(tested[0][1].classes[0].classes) > 1:
            blocks += [Heading(data)] if len(data_sets(rows)) > 1 else []
            blocks += _classes(data, tested)
    return [Section("Classes", blocks)] if blocks else []


def _classes(data: str, tested: Sequence[tuple[Contender, Tested]]) -> list[Any]:
    names = next((test.table.meta["class_names"] for _, test in tested if test.table.meta.get("class_names")), None)
    last = tested[0][1].classes[-1]
    order = last.classes if len(last.classes) <= _CLASSES else last.classes[np.argsort(last.accuracy, kind="stable")[:_CLASSES]]
    shown, values, fair, every = [], [], [], []
    for row, test in tested:
        label = row.label if len(row.on(data)) == 1 else f"{row.label} · {test.folder}"
        for column in test.classes:
            accuracy = dict(zip(column.classes.tolist(), column.accuracy.tolist(), strict=True))
            if column.name in (CLEAN, WORST):
                shown.append(f"{label}, {'clean' if column.name == CLEAN else 'worst'}")
                values.append([accuracy.get(k) for k in order.tolist()])
            fair.append([Cell(label, color=color(row.number)), Cell(column.name), *_fairness(column, names)])
            for k, n in zip(column.classes.tolist(), column.total.tolist(), strict=True):
                seen = (Cell(class_name(k, names)), number(int(n)), per_cent(accuracy[k]))
                every.append([Cell(label, color=color(row.number)), Cell(column.name), *seen])
    title = f"Accuracy by class on {data}"
    if len(order) < len(last.classes):
        title += f", the {_CLASSES} worst of {len(last.classes)} classes"
    labels = [class_name(k, names) for k in order.tolist()]
    headings = ["network", "verdict", "worst class", "its accuracy", "worst tenth", "NSD", "taken for"]
    note = (
        "Worst tenth: mean of the worst tenth of the classes, rounded up. NSD: standard deviation of the class accuracies over "
        "their mean; smaller is fairer. Taken for: where the worst class goes, in shares of it. Intervals: bootstrap."
    )
    return [
        heat(title, "class", "", labels, shown, values, "accuracy", (0, 1), share=True),
        Grid(f"How alike classes fare on {data}", headings, fair),
        Text(note),
        Fold("Accuracy of every class", [Grid(title, ["network", "verdict", "class", "samples", "accuracy in %"], every)]),
    ]


def _fairness(column: Classes, names: Sequence[str] | None) -> list[Cell]:
    worst, samples = column.accuracy[column.worst], column.total[column.worst]
    taken = ", ".join(f"{class_name(k, names)} {count / samples:.1%}" for k, count in column.taken_for)
    low, high = column.interval(fairness.worst_class, 1.0)
    spread = column.interval(fairness.nsd)
    return [
        Cell(class_name(column.classes[column.worst], names)),
        per_cent(float(worst), small=f"{100 * low:.2f} to {100 * high:.2f}" if low < high else ""),
        per_cent(column.worst_tenth),
        EMPTY if np.isnan(column.nsd) else Cell(f"{column.nsd:.3f}", column.nsd, small=f"{spread[0]:.3f} to {spread[1]:.3f}"),
        Cell(taken),
    ]
