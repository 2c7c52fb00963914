"""Robust distillation at equal settings and stated cost: ``python -m benchmarks.distillation``.

Each row is a config, trained and tested by the command line as a user would, once a seed; the teachers are runs that the
configs' headers name (``# needs:``) and that come first. Three parts:

- ``--set digits``: scikit-learn's digits, all 360 test images under PGD-20 and the standard AutoAttack;
- ``--set cifar10``: real CIFAR-10 images (``ROBUST_PL_DATA``), teacher and students as small as two CPU cores can carry, the
  first 2,000 test images under PGD-20 and the first 250 under AutoAttack;
- ``--folds``: five folds over all 1,797 digits, so that each is tested once by a network, and by teachers, that never saw it.

Each command runs in a process of one thread, as many at once as there are cores. What was finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from .folds import pooled, report
from .paired import Verdicts, over_seeds
from .runs import Runs, at_once, markdown, name_of, needs, spread
from .timing import machine
from .trials import SETTINGS, Setting

NAMES = {
    "teacher_robust": "robust teacher",
    "teacher_clean": "clean teacher",
    "pgd_at_student": "PGD-AT, no teacher",
    "ard": "ARD",
    "rslad": "RSLAD",
    "adaad": "AdaAD",
    "mtard": "MTARD",
    "bmtard": "B-MTARD",
    "absld": "ABSLD",
    "iad": "IAD",
    "iad_ii": "IAD-II",
    "ada_iad": "AdaIAD",
    "peeraid": "PeerAiD",
    "rslad_igdm": "RSLAD + IGDM",
    "aw_mtard": "AW-Net + MTARD",
    "adv_moe": "AdvMoE",
}
METHODS = ("pgd_at_student", "ard", "rslad", "adaad", "mtard", "bmtard", "absld")
FOLDS, FOLDED = 5, ("absld", "rslad")
PAIRS = (
    ("mtard", "rslad", ("mean_pgd20", "mean_autoattack")),
    ("bmtard", "rslad", ("mean_pgd20", "mean_autoattack")),
    ("absld", "rslad", ("worst_pgd20", "worst_autoattack")),
)
COLUMNS = {
    "clean": "clean",
    "pgd20": "PGD-20",
    "autoattack": "AutoAttack",
    "mean_pgd20": "mean of clean and PGD-20",
    "mean_autoattack": "mean of clean and AutoAttack",
    "worst_clean": "worst class, clean",
    "worst_pgd20": "worst class, PGD-20",
    "worst_autoattack": "worst class, AutoAttack",
    "nsd_clean": "NSD, clean",
    "nsd_pgd20": "NSD, PGD-20",
    "nsd_autoattack": "NSD, AutoAttack",
}
COSTS = {
    "forwards": "forward",
    "backwards": "backward",
    "teacher_forwards": "teacher forward",
    "teacher_backwards": "teacher backward",
    "tflop": "TFLOP",
    "seconds": "seconds",
}


def measure(
    setting: Setting, methods: Sequence[str], runs: Sequence[Runs], checkpoint: str, workers: int, test_teachers: bool = True
) -> list[dict[str, tuple[list[Verdicts], dict[str, Any]]]]:
    """For each of ``runs``, by method: the verdicts of each trial, and what training cost."""
    taught = {method: needs(setting.config(method)) for method in methods}
    teachers = list(dict.fromkeys(command for of_method in taught.values() for command in of_method))
    commands = {name_of(command): command for command in [*teachers, *map(setting.command, methods)]}

    def one(run: Runs, name: str) -> tuple[list[Verdicts], dict[str, Any]]:
        made_by = run.fit(commands[name])
        tests = [run.test(name, made_by, (t.name, t.attacks), checkpoint, t.options) for t in setting.trials]
        return [Verdicts.read(test["predictions"]) for test in tests], tests[0]["cost"]

    # Teachers come first, then who needs none: a student that waits for its teacher holds up a worker.
    fits = [partial(run.fit, command) for run in runs for command in teachers]
    alone = [name for name in methods if not taught[name]]
    order = [*alone, *(name for name in (commands if test_teachers else methods) if name not in alone)]
    rows = at_once([*fits, *(partial(one, run, name) for run in runs for name in order)], workers)[len(fits) :]
    by_run = [dict(zip(order, rows[i : i + len(order)], strict=True)) for i in range(0, len(rows), len(order))]
    return [{name: of_run[name] for name in commands if name in of_run} for of_run in by_run]


def figures(verdicts: Sequence[Verdicts], cost: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers for one seed. Clean figures are those of the first trial, means those of a trial's own images."""
    found: dict[str, float] = {}
    for trial in verdicts:
        found = {**trial.figures(), **found}
    networks, samples = dict(cost["networks"]), max(cost["samples"], 1)
    student = networks.pop("net")["training"]
    others = [network["training"] for network in networks.values()]

    def backwards(tallies: Sequence[Mapping[str, int]]) -> float:
        return sum(tally["input_backwards"] + tally["weight_backwards"] for tally in tallies) / samples

    return {
        **found,
        "cost_forwards": student["forwards"] / samples,
        "cost_backwards": backwards([student]),
        "cost_teacher_forwards": sum(tally["forwards"] for tally in others) / samples,
        "cost_teacher_backwards": backwards(others),
        "cost_tflop": float("nan") if cost["flops"] is None else cost["flops"] / 1e12,
        "cost_seconds": cost["seconds"],
    }


def lines(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text; a row's figures of each seed in, one line a row out."""
    head = ["method", *COLUMNS.values(), *COSTS.values()]
    body = []
    for name, seeds in rows.items():
        accuracies = [spread([seed[key] for seed in seeds], 2 if key.startswith("nsd") else 1) for key in COLUMNS]
        body.append(
            [
                NAMES.get(name.removesuffix("_cpu"), name),
                *accuracies,
                *(f"{mean(s[f'cost_{key}'] for s in seeds):.1f}" for key in COSTS),
            ]
        )
    return head, body


def pairs(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """The paired comparisons that the rows allow, by what is compared: the difference of each seed, and its interval."""
    found = {}
    for ours, theirs, keys in PAIRS:
        for key in keys if ours in rows and theirs in rows else ():
            one, other = ([seed[key] for seed in rows[name]] for name in (ours, theirs))
            found[f"{NAMES[ours]} against {NAMES[theirs]}, {COLUMNS[key]}"] = {
                "seeds": [a - b for a, b in zip(one, other, strict=True)],
                "over_seeds": over_seeds(one, other),
            }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the tables, write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description="Robust distillation.")
    parser.add_argument("--set", choices=sorted(SETTINGS), default="digits", help="of images")
    parser.add_argument("--folds", action="store_true", help=f"five folds of all digits; of {' and '.join(FOLDED)} by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 1 2, on cifar10 0")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME", help=f"configs; default {' '.join(METHODS)}")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of each run, to be tested")
    parser.add_argument("--output", type=Path, default=None, help="default runs/benchmark_distillation/SET")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="commands at once, one thread each")
    args = parser.parse_args(argv)
    setting = SETTINGS[args.set]
    if args.folds and args.set != "digits":
        parser.error("--folds are those of the digits: leave out --set")
    methods = args.methods or (FOLDED if args.folds else METHODS)
    missing = [method for method in methods if not setting.config(method).is_file()]
    if missing:
        parser.error(f"--methods {missing[0]!r} has no config {setting.configs.format(missing[0])}")
    if args.folds and len(methods) != 2:
        parser.error(f"--folds compares two methods, not {len(methods)}: give the one that should win first")
    seeds = args.seeds or ([0, 1, 2] if args.set == "digits" else [0])
    output = args.output or Path("runs/benchmark_distillation") / ("folds" if args.folds else args.set)
    told = {"seeds": seeds, "checkpoint": args.checkpoint, "machine": machine()}
    if args.folds:
        runs = [
            Runs(output.resolve() / f"fold{fold}_seed{seed}", seed, ("--data.init_args.fold", str(fold)))
            for seed in seeds
            for fold in range(FOLDS)
        ]
        found = measure(setting, methods, runs, args.checkpoint, args.workers, test_teachers=False)
        by_method = {method: [of_run[method][0][0] for of_run in found] for method in methods}
        text, numbers = report(
            *(pooled(of_folds, FOLDS) for of_folds in by_method.values()), [NAMES.get(m, m) for m in methods]
        )
    else:
        runs = [Runs(output.resolve() / f"seed{seed}", seed) for seed in seeds]
        found = measure(setting, methods, runs, args.checkpoint, args.workers)
        rows = {name: [figures(*of_run[name]) for of_run in found] for name in found[0]}
        compared = pairs(rows)
        text = markdown(*lines(rows))
        listed = [[k, ", ".join(f"{d:+.1f}" for d in v["seeds"]), v["over_seeds"].text()] for k, v in compared.items()]
        text += "\n" + markdown(["compared", "difference of each seed", "mean and 95 % interval"], listed) if listed else ""
        numbers = {"rows": rows, "pairs": {k: {**v, "over_seeds": asdict(v["over_seeds"])} for k, v in compared.items()}}
    print(text)
    (output / "distillation.md").write_text(text)
    (output / "distillation.json").write_text(json.dumps({**told, **numbers}, indent=1) + "\n")
    print(f"Written: {output / 'distillation.md'}, {output / 'distillation.json'}")


if __name__ == "__main__":
    main()
