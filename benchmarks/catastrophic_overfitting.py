"""Catastrophic overfitting on real CIFAR-10 images, and what cures it: ``python -m benchmarks.catastrophic_overfitting``.

Each method trains a ResNet-20 at 16/255 under the same budget: the same 2,560 images, epochs, learning rates and first weights;
Sub-AT stays in the span of the weights that a short run of fast adversarial training at 8/255 went through. The monitor
measures FGSM and PGD-10 accuracy on 256 training images after each epoch, and a test PGD-20 on 512 test images. Two cores can
carry this; it says nothing about accuracies at full size. Each command runs in a process of one thread, as many at once as
there are cores; what was finished is not run again.

Needs CIFAR-10 under ``ROBUST_PL_DATA``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from rich.console import Console
from rich.table import Table

from .timing import machine

EPS, IMAGES, EPOCHS = "16/255", 2560, 10
START, START_EPOCHS = "start", 5
FGSM = {"class_path": "FGSM", "init_args": {"eps": EPS, "bn_mode": "train"}}
LAW = {"class_path": "FGSM", "init_args": {"eps": EPS, "bn_mode": "train", "random_start": "bernoulli"}}
FAST = {"class_path": "FGSM", "init_args": {"eps": "8/255", "step_size": "10/255", "random_start": True, "bn_mode": "train"}}
METHODS: dict[str, dict[str, Any]] = {
    "FGSM-AT": {"class_path": "FGSMAT", "init_args": {"attack": FGSM}},
    "N-FGSM": {"class_path": "NFGSM", "init_args": {"attack": {"class_path": "NoisyFGSM", "init_args": {"eps": EPS}}}},
    "GradAlign": {"class_path": "GradAlign", "init_args": {"attack": FGSM, "lmbda": 2.0}},
    "FGSM-LAW": {"class_path": "FGSMLAW", "init_args": {"attack": LAW}},
    "Sub-AT": {"class_path": "SubspaceAT", "init_args": {"attack": FGSM, "trajectory": f"runs/{START}", "dim": 20}},
}


def config(name: str) -> dict[str, Any]:
    """The whole experiment of one method, or of the first run."""
    model = METHODS.get(name, {"class_path": "FastAT", "init_args": {"attack": FAST}})
    arguments = {**model["init_args"], "net": {"class_path": "ResNet20", "init_args": {"mean": MEAN, "std": STD}}}
    subspace = model["class_path"] == "SubspaceAT"
    settings = {"lr": 0.3, "momentum": 0.9} if subspace else {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    arguments["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": settings}
    arguments["schedule"] = {"class_path": "OneCycle"}
    monitor = {"class_path": "CatastrophicOverfitting", "init_args": {"eps": EPS}}
    trajectory = {"class_path": "WeightTrajectory", "init_args": {"times_per_epoch": 5}}
    data = {"val_size": 50_000 - IMAGES, "batch_size": 128, "eval_batch_size": 256}
    attacks = {
        "fgsm": {"class_path": "FGSM", "init_args": {"eps": EPS}},
        "pgd20": {"class_path": "PGD", "init_args": {"eps": EPS, "steps": 20, "step_size": "2/255"}},
    }
    return {
        "model": {"class_path": model["class_path"], "init_args": arguments},
        "data": {"class_path": "CIFAR10DataModule", "init_args": data},
        "attacks": attacks,
        "trainer": {
            "max_epochs": START_EPOCHS if name == START else EPOCHS,
            "limit_val_batches": 0,
            "limit_test_batches": 2,
            "callbacks": [trajectory if name == START else monitor],
        },
    }


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def fit(name: str, output: Path) -> Path:
    """The folder of a run, which is made unless it is finished."""
    folder, done = output / "runs" / name, output / f"{name}.done"
    if not done.exists():
        (output / f"{name}.yaml").write_text(yaml.safe_dump(config(name)))
        shutil.rmtree(folder, ignore_errors=True)  # of a benchmark that was killed
        call(output, "fit", "-c", f"{name}.yaml", "--run.name", name)
        done.touch()
    return folder


def measure(name: str, output: Path) -> dict[str, Any]:
    """Curves of the monitor, and the test, of one method."""
    kept = output / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    run = fit(name, output)
    call(output, "test", "--ckpt_path", f"{run}/checkpoints/last.ckpt", "--evaluation.output_dir", f"{run}/test")
    rows = list(csv.DictReader((run / "metrics" / "version_0" / "metrics.csv").open(newline="")))
    found: dict[str, Any] = {"curves": {}, "test": {}}
    for key in sorted({k for row in rows for k in row if k.startswith("monitor/co_")}):
        found["curves"][key.removeprefix("monitor/co_")] = [float(row[key]) for row in rows if row.get(key)]
    for folder in sorted(run.glob("test*")):
        found["test"][folder.name.removeprefix("test").strip("-") or "raw"] = json.loads((folder / "figures.json").read_text())
    kept.write_text(json.dumps(found, indent=1))
    return found


def call(output: Path, *arguments: str) -> None:
    """``robust-pl`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "robust_pl", *arguments], cwd=output, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"robust-pl {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """FGSM and PGD accuracy on the monitor's images, epoch by epoch."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, (("fgsm", "FGSM"), ("pgd", "PGD-10")), strict=True):
        for name, result in found.items():
            values = [100 * v for v in result["curves"][key]]
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        axis.set(title=f"{title}, linf {EPS}", xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 256 training images, %")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing; print the table, write JSON and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catastrophic_overfitting", description="Collapse and cures.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_catastrophic_overfitting"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="commands at once, one thread each")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    fit(START, output)
    with ThreadPoolExecutor(args.workers) as pool:
        found = dict(zip(METHODS, pool.map(lambda name: measure(name, output), METHODS), strict=True))
    table = Table(title=f"CIFAR-10, linf {EPS}, ResNet-20, {IMAGES} images, {EPOCHS} epochs each")
    for column in ("method", "weights", "FGSM, probe", "PGD-10, probe", "clean, test", "FGSM, test", "PGD-20, test"):
        table.add_column(column, justify="left" if column in ("method", "weights") else "right")
    for name, result in found.items():
        for weights, test in result["test"].items():
            probe = [f"{100 * result['curves'][key][-1]:.1f}" for key in ("fgsm", "pgd")] if weights == "raw" else ["", ""]
            tested = [f"{100 * test[f'acc_{key}']:.1f}" for key in ("clean", "fgsm", "pgd20")]
            table.add_row(name, weights, *probe, *tested)
    Console(width=120).print(table)
    plot(found, output / "catastrophic_overfitting.png")
    (output / "catastrophic_overfitting.json").write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    print(f"Written: {args.output}/catastrophic_overfitting.png and .json")


if __name__ == "__main__":
    main()
