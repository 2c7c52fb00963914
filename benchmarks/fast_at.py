"""Fast adversarial training, compared fairly: ``python -m benchmarks.fast_at --dataset cifar10 --methods all --seeds 0 1 2``.

Every method runs the protocol of the FastAT benchmark (Pan and Yao 2026, arXiv 2604.22853) by the command line, as a user
would: a base of ``configs/fast_at``, the method's file behind it and, where there is one, what it has otherwise on that data
set. ``--settings paper`` adds what the method's own paper has otherwise, at the same network and number of epochs. Tested are,
as there, the weights, raw or averaged, that did better under PGD-10 in validation, of the best epoch; ``pgd_at`` is its last
epoch's raw weights, and ``pgd_at_wa`` the same training, tested as the others are.

Sets: ``cifar10``, ``cifar100`` and ``tiny_imagenet`` need a GPU; ``cifar10_cpu`` is CIFAR-10 at a scale that two cores can
carry, with PGD on the first 1,000 test images, AutoAttack and the CR attack on the first 250. All need their files under
``ROBUST_PL_DATA``. What was finished is kept in ``--output`` and not run again; what was stopped goes on from its last
checkpoint. Written are a table beside the published one, in Markdown and JSON, and plots of robust accuracy against cost.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from .fast_at_curves import best_epoch, chosen_weights, collapse, curves, seen, training_cost, validation
from .fast_at_plot import plot
from .fast_at_table import against_published, table
from .runs import ROOT, Runs, at_once
from .timing import machine

CONFIGS = "configs/fast_at"
SETTINGS = ("protocol", "paper")
# Trials of each set: a name, the attacks, further options. The first one's clean accuracy counts.
TRIALS: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    **dict.fromkeys(("cifar10", "cifar100", "tiny_imagenet"), (("all", (), ()),)),
    "cifar10_cpu": (
        ("pgd", ("pgd10", "pgd20", "pgd50"), ("--trainer.limit_test_batches", "4")),
        ("strong", ("autoattack", "cr"), ("--trainer.limit_test_batches", "1")),
    ),
}
LEAN = ("--evaluation.save_adversarial", "false", "--report.flags", "0")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: that of the published table.
        method: a file of ``configs/fast_at/methods``.
        setting: ``protocol`` or ``paper``.
        last: test the last epoch's raw weights instead of those that validation chose.
    """

    name: str
    method: str
    setting: str = "protocol"
    last: bool = False

    @property
    def label(self) -> str:
        """How the table calls it."""
        return self.name if self.setting == "protocol" else f"{self.name}, {self.setting}"

    def configs(self, dataset: str) -> list[str]:
        """The files behind each other, those that there are."""
        parts = [f"{dataset}.yaml", f"methods/{self.method}.yaml", f"methods/{dataset}/{self.method}.yaml"]
        parts += [f"paper/{self.method}.yaml", f"paper/{dataset}/{self.method}.yaml"] if self.setting == "paper" else []
        files = [f"{CONFIGS}/{part}" for part in parts]
        return [file for i, file in enumerate(files) if i < 2 or (ROOT / file).is_file()]

    def command(self, dataset: str) -> str:
        """What trains it."""
        return f"robust-pl fit {' '.join(f'-c {file}' for file in self.configs(dataset))} --run.name {self.method}"


def rows_of(dataset: str, setting: str) -> list[Row]:
    """All rows that there are configs for; of the paper's setting, where it differs."""
    folder = ROOT / CONFIGS
    found = []
    for file in sorted((folder / "methods").glob("*.yaml")):
        method = file.stem
        if setting == "paper" and not any(
            (folder / part / f"{method}.yaml").is_file() for part in ("paper", f"paper/{dataset}")
        ):
            continue
        if method == "pgd_at" and setting == "protocol":
            found += [Row("pgd_at", method, last=True), Row("pgd_at_wa", method)]
        else:
            found.append(Row(method, method, setting))
    return found


def measure(row: Row, runs: Runs, dataset: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Train and test one row for one seed, where that is missing: its figures, accuracies in percent."""
    made_by = runs.fit(row.command(dataset))
    where = runs.folder / "runs" / row.method
    config = yaml.safe_load((where / "config.yaml").read_text())
    found = curves(where)
    last = max(found["val/acc_pgd10"])
    epoch = last if row.last else best_epoch(where)
    weights = "raw" if row.last else chosen_weights(found, epoch, config["run"]["monitor"])
    figures: dict[str, Any] = {}
    for name, attacks, more in TRIALS[dataset]:
        asked = (name, {key: config["attacks"][key] for key in attacks or config["attacks"] if key in config["attacks"]})
        checkpoint = "last" if row.last else "best"
        test = runs.test(row.method, made_by, asked, checkpoint, (*LEAN, *more, *options), weights)
        tested = test["figures"][weights]
        figures = {**{k.removeprefix("acc_"): 100 * v for k, v in tested.items() if k.startswith("acc_")}, **figures}
    figures.pop("worst", None)
    state = {"weights": weights, "epoch": epoch, "epochs": config["trainer"]["max_epochs"]}
    state |= {**validation(found, weights, epoch), "collapse": collapse(found), "seen": seen(found)}
    return {**state, **figures, **training_cost(test["cost"])}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; print the table, write it and the plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast_at", description="Fast adversarial training.")
    parser.add_argument("--dataset", choices=list(TRIALS), default="cifar10")
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME", help="rows of the table; or all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["protocol"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=None, help="default runs/benchmark_fast_at/DATASET")
    parser.add_argument("--workers", type=int, default=None, help="commands at once; default one a GPU, else one a core")
    parser.add_argument("--options", default="", help="further options of every fit, in one string: they make it another run")
    args = parser.parse_args(argv)
    rows = [row for setting in args.settings for row in rows_of(args.dataset, setting)]
    names = sorted({row.name for row in rows})
    unknown = [name for name in args.methods if name not in (*names, "all")]
    if unknown:
        parser.error(f"--methods {unknown[0]!r} is unknown in {' and '.join(args.settings)}: choose from {', '.join(names)}")
    rows = [row for row in rows if "all" in args.methods or row.name in args.methods]
    output = (args.output or Path("runs/benchmark_fast_at") / args.dataset).resolve()
    workers = args.workers or torch.cuda.device_count() or os.cpu_count() or 1
    options = args.options.split()
    folders = {(s, seed): Runs(output / s / f"seed{seed}", seed, options) for s in args.settings for seed in args.seeds}
    # Seed by seed, so that a benchmark that is stopped early has whole seeds.
    tasks = [partial(measure, row, folders[row.setting, seed], args.dataset) for seed in args.seeds for row in rows]
    results = at_once(tasks, workers)
    found = {row: results[i :: len(rows)] for i, row in enumerate(rows)}
    text = table({row.label: seeds for row, seeds in found.items()})
    compared, differences = against_published(
        args.dataset, {row.name: s for row, s in found.items() if row.setting == "protocol"}
    )
    text += f"\nBeside the published table, ours - theirs:\n\n{compared}" if compared else ""
    print(text)
    (output / "fast_at.md").write_text(text)
    report = {"dataset": args.dataset, "seeds": args.seeds, "options": options, "machine": machine()}
    report |= {"rows": {row.label: seeds for row, seeds in found.items()}, "minus_published": differences}
    (output / "fast_at.json").write_text(json.dumps(report, indent=1) + "\n")
    written = ["fast_at.md", "fast_at.json"]
    for axis in ("passes", "seconds"):
        plot({row.label: seeds for row, seeds in found.items()}, axis, args.dataset, output / f"fast_at_{axis}.png")
        written.append(f"fast_at_{axis}.png")
    print("Written:", ", ".join(str(output / name) for name in written))


if __name__ == "__main__":
    main()
