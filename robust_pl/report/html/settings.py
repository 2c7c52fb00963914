"""Sections on what runs are and what they were made with: the overview, configs, what differs, versions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import yaml

from .blocks import NOTHING, Cell, Code, Fold, Grid, Section, Text
from .contenders import contenders
from .paper_table import paper_tables
from .plots_html import color
from .run import Run


def overview_section(runs: Sequence[Run]) -> Section:
    """The runs, the table for papers, and what is missing."""
    headings = ["run", "method", "trained on", "seed", "hardware", "evaluations"]
    lines = []
    for place, run in enumerate(runs):
        seed = "" if run.seed is None else str(run.seed)
        tests = ", ".join(test.folder for test in run.tests)
        cells = (run.method, run.trained_on, seed, run.hardware, tests)
        lines.append([Cell(run.label, color=color(place)), *(Cell(text or NOTHING) for text in cells)])
    blocks: list[Any] = []
    tables = paper_tables(runs)
    for table in tables:
        cells = [
            [Cell(label), *(Cell(text or NOTHING, _leading(text), best) for text, best in line)]
            for (label, _), line in zip(table.rows, table.cells(), strict=True)
        ]
        caption = f"{table.data}: all at a glance, the best in bold"
        blocks += [
            Grid(caption, ["network", *(column.heading for column in table.columns)], cells),
            Text(" ".join(table.notes)),
        ]
    blocks.append(Grid("Runs", headings, lines))
    if tables:
        markdown = "\n\n".join(table.as_markdown() for table in tables)
        blocks.append(
            Fold("The same for papers, in Markdown", [Code("Markdown", [(line, "") for line in markdown.splitlines()])])
        )
    for row in contenders(runs):
        if others := [run.label for run in row.runs if run is not row.run]:
            blocks.append(Text(f"{row.label} is also the network of {', '.join(others)}, whose tests are shown as its own."))
    blocks += [Text(f"{run.label}: {gap}", "warning") for run in runs for gap in run.gaps]
    return Section("Overview", blocks)


def _leading(text: str) -> float | str:
    return float(text.split(" ")[0]) if text else ""


def config_sections(runs: Sequence[Run]) -> list[Section]:
    """What differs from the first run, and every file as it is."""
    blocks: list[Any] = []
    with_config = [run for run in runs if run.config]
    for run in with_config[1:]:
        first = with_config[0]
        there, here = (_as_lines(one.config) for one in (first, run))
        lines = list(difflib.unified_diff(there, here, first.label, run.label, lineterm="", n=2))
        said = f"{run.label}: what differs from {first.label}"
        code = Code(said, [(line, _class(line)) for line in lines])
        blocks.append(Fold(said, [code]) if lines else Text(f"{run.label} has the same config as {first.label}."))
    files = []
    for run in runs:
        for name, text in run.configs.items():
            said = f"{run.label}: {name}"
            files.append(Fold(said, [Code(said, [(line, "") for line in text.splitlines()])]))
    blocks += [Fold("The exact configs", files)] if files else []
    return [Section("Configs", blocks)] if blocks else []


def _as_lines(config: Any) -> list[str]:
    """In the order of the alphabet, since that in which a config names its fields means nothing."""
    return str(yaml.safe_dump(config)).splitlines()


def _class(line: str) -> str:
    return "at" if line.startswith(("---", "+++")) else {"+": "add", "-": "del", "@": "at"}.get(line[:1], "")


def setting_section(runs: Sequence[Run]) -> Section:
    """Seeds, hardware and versions; what is not the same everywhere is bold."""
    rows: dict[str, list[str]] = {
        "seed": ["" if run.seed is None else str(run.seed) for run in runs],
        "trained on": [run.hardware for run in runs],
        "tested on": [", ".join(dict.fromkeys(str(t.table.meta.get("hardware") or "") for t in run.tests)) for run in runs],
    }
    for name in dict.fromkeys(name for run in runs for name in run.versions):
        rows[name] = [str(run.versions.get(name, "")) for run in runs]
    lines = [[Cell(name), *(Cell(text or NOTHING, best=len(set(texts)) > 1) for text in texts)] for name, texts in rows.items()]
    table = Grid("Seeds, hardware and versions; what differs is bold", ["setting", *(run.label for run in runs)], lines)
    return Section("Measured with", [table])
