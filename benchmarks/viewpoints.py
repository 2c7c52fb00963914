"""Training against viewpoints, compared: ``python -m benchmarks.viewpoints --seeds 0 1 2``.

Four trainings of ``configs/views`` on procedural solids, of one network, data and schedule: standard training on natural views,
and with further natural, random and adversarial (VIAT) views of the same objects rendered at each step. Each is run by the
command line as a user would; its last weights are then attacked on the objects of the test, which nobody trained on:

- ``clean``: natural views; ``random``: views from all of the space.
- ``search 1``: the worst of as many random views as ViewFool renders, under the noise that its distribution ends with;
  ``viewfool``: 51 candidates, 25 iterations, of which ten look for a start at random; ``middle``: its published start.
- ``search 5``: likewise the 5 worst of as many as GMVFool renders; ``gmvfool``: 5 components, 51 candidates, 25 iterations,
  likewise; ``spread``: its published start.

The table holds accuracy over 100 fresh views of each object, and beside it how many objects are still right at the worst of all
views that were rendered and the mean loss there. A command runs in a process of one thread, as many at once as there are
cores. What was finished is kept in ``--output`` and not done again; a killed training goes on from its last checkpoint, and a
killed attack where it was. Written are ``viewpoints.md`` and ``viewpoints.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .runs import ROOT, Runs, at_once, digest, markdown, spread
from .timing import machine
from .view_attacks import attacks

TRAININGS = ("standard", "random", "natural", "viat")
CONFIGS = "configs/views"
# The distributions that are found are measured below; in training they would only cost.
LEAN = ("--trainer.callbacks", "[]")


def measure(
    names: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    workers: int,
    sizes: Mapping[str, int],
    options: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every training for every seed, by its name."""
    runs = [Runs(output / f"seed{seed}", seed, (*LEAN, *options)) for seed in seeds]

    def one(run: Runs, name: str) -> dict[str, Any]:
        made_by = run.fit(f"robust-pl fit -c {CONFIGS}/{name}.yaml")
        kept, asked = run.folder / "tests" / f"{name}.json", digest([made_by, dict(sizes)])
        if not kept.exists() or json.loads(kept.read_text())["asked"] != asked:
            _in_a_process(run.folder, name, asked, sizes)
        return json.loads(kept.read_text())

    # Seed by seed, so that a benchmark that is stopped early has whole seeds.
    found = at_once([partial(one, run, name) for run in runs for name in names], workers)
    return {name: found[i :: len(names)] for i, name in enumerate(names)}


def _in_a_process(folder: Path, name: str, asked: str, sizes: Mapping[str, int]) -> None:
    command = [sys.executable, "-m", "benchmarks.view_attacks", str(folder), name, asked, json.dumps(dict(sizes))]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the attacks on {name} in {folder} failed:\n{done.stderr[-2000:]}")
    print(f"{folder.name} {name}.test: {time.perf_counter() - began:.0f} s", flush=True)


def lines(found: Mapping[str, Sequence[Mapping[str, Any]]], figure: str) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table of one figure, as text: percent, or a loss."""
    names = list(next(iter(found.values()))[0]["figures"])
    scale, digits = (1, 2) if figure == "worst_loss" else (100, 1)
    body = []
    for training, results in found.items():
        cells = [spread([scale * result["figures"][name][figure] for result in results], digits) for name in names]
        body.append([training, *cells, f"{sum(result['seconds'] for result in results) / len(results):.0f}"])
    return ["training", *names, "seconds"], body


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the tables, write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewpoints", description="Training against viewpoints.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS, metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_viewpoints"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="commands at once, one thread each")
    parser.add_argument("--popsize", type=int, default=51, help="candidates of ViewFool and GMVFool")
    parser.add_argument("--iterations", type=int, default=25, help="of both, at least 11")
    parser.add_argument("--samples", type=int, default=100, help="fresh views of each object")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further arguments of every fit; comes last")
    args = parser.parse_args(argv)
    sizes = {"popsize": args.popsize, "iterations": args.iterations, "samples": args.samples}
    try:
        attacks(**sizes)
    except ValueError as error:
        parser.error(str(error))
    found = measure(args.trainings, args.seeds, args.output.resolve(), args.workers, sizes, args.options)
    titles = {
        "acc": "Accuracy over fresh views, percent",
        "worst_view": "Objects right at the worst view that was rendered, percent",
        "worst_loss": "Cross-entropy at the worst view",
    }
    text = [f"Seeds {args.seeds}, {args.popsize} candidates, {args.iterations} iterations; mean and deviation over seeds.\n"]
    for figure, title in titles.items():
        head, body = lines(found, figure)
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(head):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in body:
            table.add_row(*row)
        Console(width=140).print(table)
        text.append(f"## {title}\n\n{markdown(head, body)}")
    (args.output / "viewpoints.md").write_text("\n".join(text))
    report = {"seeds": args.seeds, **sizes, "machine": machine(), "rows": found}
    (args.output / "viewpoints.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written: {args.output / 'viewpoints.md'}, {args.output / 'viewpoints.json'}")


if __name__ == "__main__":
    main()
