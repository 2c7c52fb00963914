"""Sections on the training: what it cost, and its course."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cost import cost_figures, cost_note
from ..summary import CLEAN, WORST
from .blocks import EMPTY, Cell, Fold, Grid, Plot, Row, Section, Text, number
from .contenders import contenders, data_sets, verdicts
from .plots_html import color, curves, points
from .run import Run

_COLUMNS = (
    ("device_hours", "device hours"),
    ("seconds", "seconds"),
    ("samples", "samples"),
    ("forwards", "forward passes"),
    ("input_backwards", "backward, to the input"),
    ("weight_backwards", "backward, to the weights"),
    ("flops", "FLOPs"),
    ("images_per_second", "samples a second"),
    ("peak_memory", "peak memory in GiB"),
    ("evaluation_seconds", "seconds of validation"),
)
_POINTS = 400
"""A longer course is drawn by the means of so many parts."""
_FIRST = ("train/loss", "val/loss", "val/acc_clean", "val/acc_worst", "lr")
_HIDDEN = ("val/forwards", "val/backwards", "val/seconds", "val/renders_per", "val/class_acc")


def cost_sections(runs: Sequence[Run]) -> list[Section]:
    """What trainings cost, and what came of it; no section where nothing is known."""
    known = [(place, run) for place, run in enumerate(runs) if run.cost]
    if not known:
        return []
    lines = []
    for place, run in known:
        figures = cost_figures(run.cost or {})
        if "peak_memory" in figures:
            figures["peak_memory"] /= 2**30
        device = f"{(run.cost or {}).get('devices', 1)} x {(run.cost or {}).get('device', '')}"
        lines.append([Cell(run.label, color=color(place)), Cell(device), *(_amount(figures.get(key)) for key, _ in _COLUMNS)])
    blocks: list[Any] = [Row(plots)] if (plots := _price(runs)) else []
    blocks.append(Grid("Cost of the training", ["run", "devices", *(heading for _, heading in _COLUMNS)], lines))
    blocks.append(Fold("What these figures hold", [Text(f"{run.label}: {cost_note(run.cost or {})}") for _, run in known]))
    return [Section("Cost", blocks)]


def _amount(value: float | None) -> Cell:
    return EMPTY if value is None else number(float(value))


def _price(runs: Sequence[Run]) -> list[Plot]:
    """For each data set of several trained networks the accuracy over the hours it took."""
    plots = []
    rows = contenders(runs)
    for data in data_sets(rows):
        judged = verdicts([row for row in rows if row.run.cost and row.run.trained_on == data], data)
        name = WORST if WORST in judged.columns else CLEAN
        found = [
            (row.label, row.number, float((row.run.cost or {})["device_hours"]), 100 * float(right[name].mean()))
            for row, right in judged.right
            if name in right
        ]
        if len(found) > 1:
            said = "worst-case" if name == WORST else "clean"
            hours = [x for _, _, x, _ in found]
            title = f"Accuracy on {data} over the cost of training"
            plots.append(points(title, "device hours", f"{said} accuracy in %", found, min(hours) > 0))
    return plots


def training_sections(runs: Sequence[Run]) -> list[Section]:
    """The course of every figure, of all runs over each other; those that most people look for first."""
    names = sorted({name for run in runs for name in run.training if not name.startswith(_HIDDEN)}, key=_rank)
    first = [name for name in names if _rank(name)[0] < len(_FIRST) + 1]
    more = [name for name in names if name not in first]
    blocks: list[Any] = [Row([plot for name in first for plot in _courses(name, runs)])] if first else []
    if more:
        blocks.append(Fold(f"{len(more)} further figures", [Row([plot for name in more for plot in _courses(name, runs)])]))
    return [Section("Training", blocks)] if blocks else []


def _rank(name: str) -> tuple[int, str]:
    for place, wanted in enumerate(_FIRST):
        if name == wanted or (wanted == "lr" and name.startswith("lr")):
            return place, name
    return (len(_FIRST) if name.startswith("val/acc") else len(_FIRST) + 1), name


def _courses(name: str, runs: Sequence[Run]) -> list[Plot]:
    """One plot, or one for each axis where some runs have it by step and some by epoch."""
    share = name.startswith(("val/acc_", "val/worst_class", "val/worst_tenth")) or "/acc_" in name
    plots = []
    for axis in ("epoch", "step"):
        series = [
            (run.label, place, place // 6, *_thinned(run.training[name].x, run.training[name].y))
            for place, run in enumerate(runs)
            if name in run.training and run.training[name].axis == axis
        ]
        if series:
            plots.append(curves(name, axis, name.rpartition("/")[2], series, share=share))
    return plots


def _thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    step = -(-len(x) // _POINTS)
    if step < 2:
        return x, y
    parts = [slice(begin, begin + step) for begin in range(0, len(x), step)]
    return [x[part][-1] for part in parts], [sum(y[part]) / len(y[part]) for part in parts]
