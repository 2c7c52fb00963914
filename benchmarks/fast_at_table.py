"""The tables of the comparison of fast adversarial training: plain figures in, Markdown out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .runs import markdown, spread

PUBLISHED = Path(__file__).with_name("fast_at_published.json")
ATTACKS = {"clean": "clean", "pgd10": "PGD-10", "pgd20": "PGD-20", "pgd50": "PGD-50", "autoattack": "AutoAttack", "cr": "CR"}
COSTS = {
    "forwards": "forward",
    "backwards": "backward",
    "seconds": "seconds",
    "images_per_second": "images/s",
    "peak_gib": "GiB",
}
Seeds = Sequence[Mapping[str, Any]]


def robust(seeds: Seeds) -> tuple[str, float]:
    """The strongest attack that every seed was tested with, and mean accuracy under it."""
    key = next(key for key in ("autoattack", "cr", "pgd50", "pgd20", "pgd10") if all(key in seed for seed in seeds))
    return key, mean(seed[key] for seed in seeds)


def ranked(rows: Mapping[str, Seeds]) -> list[str]:
    """Names of the rows, the most robust first; those that were tested by AutoAttack before others."""
    found = {name: robust(seeds) for name, seeds in rows.items()}
    return sorted(rows, key=lambda name: (found[name][0] != "autoattack", -found[name][1]))


def table(rows: Mapping[str, Seeds]) -> str:
    """Accuracies in percent, mean and sample standard deviation over seeds, and what was seen and spent.

    Args:
        rows: figures of every seed, by the row's name.
    """
    accuracies = [key for key in ATTACKS if any(key in seed for seeds in rows.values() for seed in seeds)]
    head = ["method", "weights", *(ATTACKS[key] for key in accuracies), "PGD-10 in validation: tested epoch, last epoch"]
    head += ["epoch of collapse", "seen by the monitor", *COSTS.values()]
    body = []
    for name in ranked(rows):
        seeds = rows[name]
        line = [name, listed([f"{seed['weights']} {seed['epoch']}" for seed in seeds])]
        line += [spread([seed[key] for seed in seeds]) if all(key in seed for seed in seeds) else "" for key in accuracies]
        line.append(", ".join(spread([seed[key] for seed in seeds]) for key in ("val_best", "val_last")))
        line += [listed(["-" if seed[key] is None else str(seed[key]) for seed in seeds]) for key in ("collapse", "seen")]
        line += [average([seed[key] for seed in seeds], 2 if key == "peak_gib" else 1) for key in COSTS]
        body.append(line)
    return markdown(head, body)


def listed(values: Sequence[str]) -> str:
    """What each seed has, or once what all have."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def average(values: Sequence[float | None], digits: int) -> str:
    """The mean, where all are known."""
    known = [value for value in values if value is not None]
    return f"{mean(known):.{digits}f}" if len(known) == len(values) else ""


def published() -> dict[str, Any]:
    """The published tables, see the file."""
    return json.loads(PUBLISHED.read_text())


def against_published(dataset: str, rows: Mapping[str, Seeds]) -> tuple[str, dict[str, dict[str, float]]]:
    """Ours beside the published table, and the differences of means; nothing for a set that was not published.

    Args:
        dataset: of ours.
        rows: figures of every seed in the protocol's setting, by the published name.
    """
    theirs = published()["tables"].get(dataset, {})
    collapsed = published()["collapse"].get(dataset, {})
    keys = ("clean", "pgd50", "autoattack", "cr")
    head = ["method", *(f"{ATTACKS[key]}: ours, published, difference" for key in keys), "seconds: ours, published"]
    head += ["GiB: ours, published", "seeds that collapsed: ours, published"]
    body, differences = [], {}
    for name in ranked(rows):
        if name not in theirs:
            continue
        seeds, line = rows[name], [name]
        differences[name] = {}
        for key in keys:
            value = theirs[name][key]
            value = value[0] if isinstance(value, list) else value
            if all(key in seed for seed in seeds):
                ours = mean(seed[key] for seed in seeds)
                differences[name][key] = ours - value
                line.append(f"{ours:.1f}, {value:.1f}, {ours - value:+.1f}")
            else:
                line.append(f"-, {value:.1f}")
        line.append(f"{average([seed['seconds'] for seed in seeds], 0)}, {theirs[name]['seconds']}")
        line.append(f"{average([seed['peak_gib'] for seed in seeds], 2) or '-'}, {theirs[name]['gib']}")
        count = sum(seed["collapse"] is not None for seed in seeds)
        line.append(f"{count}/{len(seeds)}, {collapsed.get(name, '0/3')}")
        body.append(line)
    return (markdown(head, body) if body else ""), differences
