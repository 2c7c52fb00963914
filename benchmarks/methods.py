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
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from robust_pl.report.cost import cost_figures

from .timing import machine

ROOT = Path(__file__).resolve().parent.parent
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
    Row("fgsm_law", "ema"),
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


class Runs:
    """The runs of one seed, in a folder of their own, each made once.

    Args:
        folder: working directory of the commands; runs lie in ``runs/`` below it.
        seed: of all of them.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._lock, self._locks = Lock(), {}
        folder.mkdir(parents=True, exist_ok=True)

    def fit(self, command: str) -> None:
        """Run ``robust-pl fit -c configs/digits/x.yaml ...`` and what that config needs, unless it is done."""
        arguments = shlex.split(command)
        if arguments[0] != "robust-pl":
            return self._once(Path(arguments[3]).stem, [*arguments[1:-1], str(self.seed)])
        place = arguments.index("-c") + 1
        config = Path(arguments[place]).stem
        name = arguments[arguments.index("--run.name") + 1] if "--run.name" in arguments else config
        for needed in needs(config):
            self.fit(needed)
        arguments[place] = str(CONFIGS / f"{config}.yaml")
        seed = () if "--seed_everything" in arguments else ("--seed_everything", str(self.seed))
        self._once(name, ["-m", "robust_pl", *arguments[1:], *seed, "--run.name", name])

    def test(self, row: Row) -> dict[str, Any]:
        """Figures of a test of a run, those of each set of weights, and the cost of its training."""
        kept = self.folder / f"{row.config}{'' if row.attacks_of is None else f'@{row.attacks_of}'}.json"
        if not kept.exists():
            run = self.folder / "runs" / row.config
            arguments = ["-m", "robust_pl", "test", "--ckpt_path", f"{run}/checkpoints/best.ckpt"]
            if row.attacks_of is not None:
                attacks = yaml.safe_load((CONFIGS / f"{row.attacks_of}.yaml").read_text())["attacks"]
                given = self.folder / f"{row.attacks_of}-attacks.yaml"
                given.write_text(yaml.safe_dump({"attacks": attacks}))
                arguments += ["-c", str(run / "config.yaml"), "-c", str(given)]
            output = self.folder / "tests" / kept.stem
            self._run(f"{kept.stem}.test", [*arguments, "--evaluation.output_dir", str(output)])
            found = [output, *output.parent.glob(f"{output.name}-*")]
            figures = {
                path.name.removeprefix(output.name).strip("-") or "raw": json.loads((path / "figures.json").read_text())
                for path in found
                if path == output or path.name.removeprefix(output.name).strip("-").isalpha()
            }
            cost = json.loads((run / "compute.json").read_text())
            kept.write_text(json.dumps({"figures": figures, "cost": cost}, indent=1))
        return json.loads(kept.read_text())

    def _once(self, name: str, arguments: Sequence[str]) -> None:
        with self._lock:
            lock = self._locks.setdefault(name, Lock())
        with lock:
            if not (self.folder / f"{name}.done").exists():
                shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)  # of a benchmark that was killed
                self._run(f"{name}.fit", arguments)
                (self.folder / f"{name}.done").touch()

    def _run(self, log: str, arguments: Sequence[str]) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": path}
        began = time.perf_counter()
        with (self.folder / f"{log}.log").open("w") as file:
            done = subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment, stdout=file, stderr=file)
        if done.returncode:
            tail = "\n".join((self.folder / f"{log}.log").read_text().splitlines()[-5:])
            raise SystemExit(f"python {shlex.join(arguments)} failed in {self.folder}:\n{tail}")
        print(f"seed {self.seed} {log}: {time.perf_counter() - began:.0f} s", flush=True)


def needs(config: str) -> list[str]:
    """Commands that the header of a config names as run before it."""
    lines = (CONFIGS / f"{config}.yaml").read_text().splitlines()
    return [line.removeprefix("# needs: ") for line in lines if line.startswith("# needs: ")]


def measure(rows: Sequence[Row], seeds: Sequence[int], output: Path, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of every row for every seed, by the row's name."""
    runs = [Runs(output / f"seed{seed}", seed) for seed in seeds]

    def one(run: Runs, row: Row) -> dict[str, Any]:
        run.fit(COMMANDS.get(row.config, f"robust-pl fit -c configs/digits/{row.config}.yaml"))
        for needed in needs(row.attacks_of) if row.attacks_of else ():
            run.fit(needed)  # its attacks may come from other runs
        return run.test(row)

    with ThreadPoolExecutor(workers) as pool:
        # Seed by seed, so that a benchmark that is stopped early has whole seeds.
        waiting = [[pool.submit(one, run, row) for row in rows] for run in runs]
        found = [[future.result() for future in of_seed] for of_seed in waiting]
    return {row.name: [pick(of_seed[i], row) for of_seed in found] for i, row in enumerate(rows)}


def pick(result: dict[str, Any], row: Row) -> dict[str, Any]:
    """Accuracies under the row's weights, in percent, and what training cost."""
    if row.weights not in result["figures"]:
        raise SystemExit(f"{row.config} has no figures of {row.weights} weights: {', '.join(result['figures'])} were tested")
    figures = {k.removeprefix("acc_"): 100 * v for k, v in result["figures"][row.weights].items() if k.startswith("acc_")}
    return {**figures, **{f"cost_{k}": v for k, v in cost_figures(result["cost"]).items()}}


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


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
    markdown = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    (args.output / "methods.md").write_text("\n".join(markdown) + "\n")
    report = {"seeds": args.seeds, "machine": machine(), "rows": found}
    (args.output / "methods.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written: {args.output / 'methods.md'}, {args.output / 'methods.json'}")


if __name__ == "__main__":
    main()
