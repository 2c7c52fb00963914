"""Every method on scikit-learn's digits, at equal settings and stated cost: ``python -m benchmarks.methods``.

Each row is a config of ``configs/digits``, trained and tested by the command line as a user would, once a seed. A row whose
method starts from other runs says so in its config's header, in lines ``# needs: COMMAND``, which are run first. Each
command runs in a process of one thread, as many at once as there are cores. What was finished is kept in ``--output`` and
not run again, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from robust_pl.report.cost import cost_figures

from .runs import ROOT, Runs, at_once, digest, markdown, needs, spread
from .timing import machine

CONFIGS = ROOT / "configs" / "digits"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        config: stem of a file in ``configs/digits``.
        weights: raw, or the name of the average that the row is about.
        attacks_of: another config, whose attacks test the run; None takes its own.
    """

    config: str
    weights: str = "raw"
    attacks_of: str | None = None

    @property
    def name(self) -> str:
        """How the table calls it."""
        more = [] if self.weights == "raw" else [self.weights]
        return ", ".join([self.config, *more, *([f"attacks of {self.attacks_of}"] if self.attacks_of else [])])


ROWS = (
    Row("standard"),
    Row("pgd_at"),
    Row("trades"),
    Row("mart"),
    Row("fr"),
    Row("fr_class1d"),
    Row("fr_swa", "swa"),
    Row("sar"),
    Row("sar_ema", "ema"),
    Row("pgd_at_awp"),
    Row("pgd_at_sam"),
    Row("trades_awp_ema", "ema"),
    Row("trades_extra", "ema"),
    Row("afa"),
    Row("fgsm_at"),
    Row("fast_at"),
    Row("free_at"),
    Row("n_fgsm"),
    Row("grad_align"),
    Row("zero_grad"),
    Row("multi_grad"),
    Row("aaer"),
    Row("elle"),
    Row("nuat"),
    Row("gat"),
    Row("ssat"),
    Row("fgsm_law", "ema"),
    Row("fgsm_pgi"),
    Row("fgsm_mep_cs"),
    Row("fgsm_rs_cs"),
    Row("fgsm_pco"),
    Row("fgsm_uap"),
    Row("fgsm_cuap"),
    Row("fgsm_fuap"),
    Row("liet"),
    Row("sub_at"),
    Row("adversarial_fine_tuning"),
    Row("pgd_at_030", attacks_of="adaptive_smoothing"),
    Row("rift", attacks_of="adaptive_smoothing"),
    Row("adaptive_smoothing"),
    Row("twa"),
    Row("layerwise_twa"),
    Row("uniform_soup"),
    Row("greedy_soup"),
    Row("learned_soup"),
    Row("mehl_soup"),
    Row("mehl_soup_layerwise"),
    Row("robust_weight_signature"),
    Row("pub_def"),
    Row("standard", attacks_of="pub_def"),
)


# Runs that no config stands for, as the headers of those that need them name them.
COMMANDS = {
    "pgd_at_030": "robust-pl fit -c configs/digits/pgd_at.yaml --run.name pgd_at_030 --model.init_args.attack.init_args.eps 0.3"
}


def measure(rows: Sequence[Row], seeds: Sequence[int], output: Path, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of every row for every seed, by the row's name."""
    runs = [Runs(output / f"seed{seed}", seed) for seed in seeds]

    def one(run: Runs, row: Row) -> dict[str, Any]:
        made_by = run.fit(COMMANDS.get(row.config, f"robust-pl fit -c configs/digits/{row.config}.yaml"))
        if row.attacks_of is None:
            return run.test(row.config, made_by)
        config = CONFIGS / f"{row.attacks_of}.yaml"
        made_by = digest([made_by, *map(run.fit, needs(config))])  # its attacks may come from other runs
        return run.test(row.config, made_by, (row.attacks_of, yaml.safe_load(config.read_text())["attacks"]))

    # Seed by seed, so that a benchmark that is stopped early has whole seeds.
    found = at_once([partial(one, run, row) for run in runs for row in rows], workers)
    return {row.name: [pick(result, row) for result in found[i :: len(rows)]] for i, row in enumerate(rows)}


def pick(result: dict[str, Any], row: Row) -> dict[str, Any]:
    """Accuracies under the row's weights, in percent, and what training cost."""
    if row.weights not in result["figures"]:
        raise SystemExit(f"{row.config} has no figures of {row.weights} weights: {', '.join(result['figures'])} were tested")
    figures = {k.removeprefix("acc_"): 100 * v for k, v in result["figures"][row.weights].items() if k.startswith("acc_")}
    return {**figures, **{f"cost_{k}": v for k, v in cost_figures(result["cost"]).items()}}


def columns(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Accuracies that any row has, in order, without the worst case over different sets of attacks."""
    return list(dict.fromkeys(k for rows in found.values() for k in rows[0] if not k.startswith("cost_") and k != "worst"))


def lines(found: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text."""
    names = columns(found)
    head = ["method", *names, "forward", "backward", "TFLOP", "seconds"]
    body = []
    for name, rows in found.items():
        accuracies = [spread([row[n] for row in rows]) if n in rows[0] else "" for n in names]
        body.append([name, *accuracies, *(f"{mean(values):.1f}" for values in zip(*map(costs, rows), strict=True))])
    return head, body


def costs(row: dict[str, Any]) -> tuple[float, ...]:
    """Forward and backward passes a training sample and epoch, TFLOP and seconds in all."""
    backwards = row["cost_input_backwards"] + row["cost_weight_backwards"]
    passes = (row["cost_forwards"] / row["cost_samples"], backwards / row["cost_samples"])
    return (*passes, row.get("cost_flops", float("nan")) / 1e12, row["cost_seconds"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description="Every method on the digits.")
    names = sorted({row.config for row in ROWS})
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME", help=f"of {', '.join(names)}; or all")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_methods"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="commands at once, one thread each")
    args = parser.parse_args(argv)
    unknown = [name for name in args.methods if name not in (*names, "all")]
    if unknown:
        parser.error(f"--methods {unknown[0]!r} is unknown: choose from {', '.join(names)}")
    rows = [row for row in ROWS if "all" in args.methods or row.config in args.methods]
    found = measure(rows, args.seeds, args.output.resolve(), args.workers)
    head, body = lines(found)
    table = Table(title=f"Digits, seeds {args.seeds}: percent of 360 test images; passes a training sample and epoch")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    Console(width=200).print(table)
    (args.output / "methods.md").write_text(markdown(head, body))
    report = {"seeds": args.seeds, "machine": machine(), "rows": found}
    (args.output / "methods.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written: {args.output / 'methods.md'}, {args.output / 'methods.json'}")


if __name__ == "__main__":
    main()
