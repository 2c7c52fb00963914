"""The section on viewpoint attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .accuracy import with_best
from .blocks import Cell, Fold, Grid, Picture, Row, Section, Text, number, per_cent
from .plots_html import bars, color
from .run import Run

_HEADINGS = ("run", "attack", "accuracy", "right at worst view", "objects", "views", "mean loss", "fields of 144", "renders")


def view_sections(runs: Sequence[Run]) -> list[Section]:
    """One section, if any run was attacked by viewpoint."""
    seen = [(place, run, {view.name: view for view in run.views}) for place, run in enumerate(runs) if run.views]
    if not seen:
        return []
    names = list(dict.fromkeys(name for _, _, views in seen for name in views))
    series, overview, lines = [], [], []
    for place, run, views in seen:
        shares = {name: view.right / view.views for name, view in views.items()}
        series.append((run.label, place, [100 * shares[name] if name in shares else None for name in names]))
        overview.append([Cell(run.label, color=color(place)), *(per_cent(shares.get(name)) for name in names)])
        for name, view in views.items():
            counts = (number(view.objects), number(view.views))
            figures = [number(view.figures.get(key)) for key in ("view_loss", "coverage", "renders")]
            standing = per_cent(view.standing / view.objects)
            cells = (Cell(name), per_cent(shares[name]), standing, *counts, *figures)
            lines.append([Cell(run.label, color=color(place)), *cells])
    blocks: list[Any] = [
        bars("Accuracy on views from the distributions that were found", names, series),
        Grid("Accuracy in % on fresh views", ["run", *names], with_best(overview, range(1, 1 + len(names)))),
        Fold("Every attack in detail", [Grid("Viewpoint attacks, accuracies in %", _HEADINGS, lines)]),
        Text(
            "Accuracy: of fresh views from the distribution found for each object. Right at worst view: share of objects. "
            "Fields: of 30 x 15 degrees on the view sphere that the views of an object fall into."
        ),
    ]
    for name in names:
        pictures: list[Any] = []
        for _, run, views in seen:
            for title, png in (views[name].pictures if name in views else {}).items():
                said = f"{title} of {name} – {run.label}"  # noqa: RUF001
                pictures.append(Picture(said, f"{title} that {name} found against {run.label}", png))
        settings = [
            [Cell(run.label), Cell(", ".join(f"{key}={value}" for key, value in views[name].settings.items()))]
            for _, run, views in seen
            if name in views
        ]
        told = Grid(f"Settings of {name}", ["run", "settings"], settings)
        blocks.append(Fold(f"{name}: pictures and settings", [*([Row(pictures)] if pictures else []), told]))
    return [Section("Viewpoints", blocks)]
