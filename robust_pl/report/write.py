"""All of the report into one folder, and to the loggers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .class_bars import plot_classes
from .classes import class_headings, class_rows, count_classes
from .curve import Curve
from .markdown import as_markdown
from .plots import plot_curves, plot_summary, save
from .robustbench_info import model_info
from .summary import HEADINGS, cells, summarise
from .table import Table


def write_report(
    table: Table,
    folder: Path,
    *,
    curves: Sequence[Curve] = (),
    grids: Mapping[str, Image.Image] | None = None,
    loggers: Iterable[Any] = (),
    known: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.md``, its pictures in ``images/`` and ``robustbench.json``; returns the path of the first.

    Args:
        table: outcomes and meta.
        folder: made if missing; files of an earlier report are replaced.
        curves: robustness curves in one norm, drawn over each other.
        grids: title -> picture, such as that of :func:`robust_pl.report.worst_images`.
        loggers: those that have ``log_table`` or ``log_image``, as wandb's has, get table and pictures as ``report/...``.
        known: see :func:`robust_pl.report.model_info`.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = summarise(table)
    drawn = {"Accuracy under attack": save(plot_summary(lines), images / "accuracy.png")}
    paths = {"Accuracy under attack": "images/accuracy.png"}
    columns, names = count_classes(table), table.meta.get("class_names")
    if len(columns[0].classes) > 1:
        drawn["Accuracy by class"] = save(plot_classes(columns, names), images / "classes.png")
        paths["Accuracy by class"] = "images/classes.png"
    if curves:
        drawn["Robustness curve"] = save(plot_curves(curves), images / "robustness_curve.png")
        paths["Robustness curve"] = "images/robustness_curve.png"
    for title, picture in (grids or {}).items():
        name = "".join(c if c.isalnum() else "_" for c in title.lower())
        picture.save(images / f"{name}.png")
        drawn[title], paths[title] = picture, f"images/{name}.png"
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table("report/summary", columns=list(HEADINGS), data=[list(cells(line)) for line in lines])
            logger.log_table("report/classes", columns=class_headings(columns), data=class_rows(columns, names))
        if hasattr(logger, "log_image"):
            for title, picture in drawn.items():
                logger.log_image(f"report/{title}", [picture])
    (folder / "robustbench.json").write_text(json.dumps(model_info(table, known=known), indent=2) + "\n")
    path = folder / "report.md"
    path.write_text(as_markdown(table, paths), encoding="utf-8")
    return path
