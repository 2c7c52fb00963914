"""The report as Markdown, as GitHub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .classes import MANY, RESAMPLES, class_headings, class_rows, count_classes, fairness_headings, fairness_rows
from .cost import HEADINGS as COST_HEADINGS
from .cost import cost_note, cost_rows
from .summary import HEADINGS, WORST, cells, summarise
from .table import Table
from .units import SYMBOLS, radius

_KNOWN = ("class", "norm", "eps", "steps", "seconds")


def as_markdown(table: Table, pictures: Mapping[str, str] | None = None) -> str:
    """The whole report: accuracies, threat models, checks, pictures, and what it was measured with.

    Args:
        table: outcomes and meta.
        pictures: title -> path of a picture, relative to the file that will hold the text.
    """
    meta = table.meta
    title = " on ".join(str(meta[key]) for key in ("model", "dataset") if meta.get(key)) or "the network"
    parts = [f"# Robustness of {title}", _figures(table), _classes(table), _threats(table), _flags(meta.get("flags"))]
    parts.append(_cost(meta.get("cost")))
    parts += [f"## {name}\n\n![{name}]({path})" for name, path in (pictures or {}).items()]
    parts.append(_setting(meta))
    return "\n\n".join(part for part in parts if part) + "\n"


def rows(headings: Sequence[str], lines: Sequence[Sequence[Any]], numbers_from: int | None = None) -> str:
    """A Markdown table; columns from ``numbers_from`` on are aligned to the right."""
    edge = len(headings) if numbers_from is None else numbers_from
    rule = [":---" if i < edge else "---:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (headings, rule, *lines))


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _figures(table: Table) -> str:
    lines = []
    for line in summarise(table):
        name, *numbers = cells(line)
        name = f"&emsp;{name}" if line.part else f"**{name}**" if line.name == WORST else name
        lines.append((name, *numbers))
    note = (
        f"{len(table):,} samples. *Worst so far*: right under this attack and all above it. The interval is that of the "
        "accuracy (Wilson) and covers the choice of samples, not attacks that were not tried. Passes are per sample."
    )
    if any(table.parts(attack) for attack in table.attacks):
        note += " Indented: what stands after that part of the attack."
    return f"{rows(HEADINGS, lines, 1)}\n\n{note}"


def _classes(table: Table) -> str:
    columns, names = count_classes(table), table.meta.get("class_names")
    count = len(columns[0].classes)
    if count < 2:
        return ""
    fair = rows(fairness_headings(columns), fairness_rows(columns, names), 1)
    every = rows(class_headings(columns), class_rows(columns, names), 1)
    if count > MANY:
        every = f"<details><summary>all {count} classes, the worst first</summary>\n\n{every}\n\n</details>"
    note = (
        "NSD: population standard deviation of the class accuracies over their mean; smaller is fairer. *Taken for*: where the "
        "network puts the worst class, in shares of that class. "
        f"Intervals: basic bootstrap within classes, {RESAMPLES:,} resamples. Where classes have few samples chance alone sets "
        "them apart, so that the worst class looks worse, and NSD larger, than on many: the intervals, which allow for it, may "
        "then lie beside the figure. There is none where resamples do not differ, as for a class that is never right."
    )
    return f"## Classes\n\n{fair}\n\n{note}\n\n{every}"


def _threats(table: Table) -> str:
    lines = []
    for attack in table.attacks:
        about = table.about(attack)
        norm = about.get("norm")
        other = ", ".join(f"{key}={value}" for key, value in about.items() if key not in _KNOWN)
        kind = str(about.get("class", "")).rpartition(".")[2]
        lines.append(
            (attack, kind, SYMBOLS.get(norm, norm or ""), radius(about.get("eps"), norm), about.get("steps", ""), other)
        )
    headings = ("attack", "class", "norm", "eps", "steps", "further settings")
    return f"## Threat models\n\n{rows(headings, lines)}" if lines else ""


def _flags(flags: Sequence[Mapping[str, Any]] | None) -> str:
    if flags is None:
        return ""
    raised = [flag for flag in flags if flag.get("raised")]
    verdict = f"**{len(raised)} of {len(flags)} raised: the accuracies above may be too high.**" if raised else ""
    verdict = verdict or f"None of {len(flags)} raised."
    ordered = [*raised, *(flag for flag in flags if not flag.get("raised"))]
    lines = [
        (flag.get("name", ""), "**yes**" if flag.get("raised") else "no", _number(flag.get("value")), flag.get("message", ""))
        for flag in ordered
    ]
    table = f"\n\n{rows(('check', 'raised', 'value', 'meaning'), lines)}" if lines else ""
    return f"## Checks for gradient masking\n\n{verdict}{table}"


def _cost(cost: Mapping[str, Any] | None) -> str:
    if not cost:
        return ""
    return f"## Cost of the training\n\n{rows(COST_HEADINGS, cost_rows(cost), 1)}\n\n{cost_note(cost)}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(meta: Mapping[str, Any]) -> str:
    lines = [("hardware", meta["hardware"])] if meta.get("hardware") else []
    lines += list(meta.get("versions", {}).items())
    text = f"## Measured with\n\n{rows(('', ''), lines)}" if lines else ""
    config = meta.get("config")
    if config:
        shown = config if isinstance(config, str) else json.dumps(config, indent=2, default=str)
        text += f"\n\n<details><summary>config</summary>\n\n```\n{shown.strip()}\n```\n\n</details>"
    return text.strip()
