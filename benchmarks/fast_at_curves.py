"""What a run's own records say: its validation curves, which weights are tested, and whether it collapsed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

GAP = 0.3
"""The published rule: raw validation accuracy under FGSM exceeds that under PGD-10 by more than 30 points."""
CHOOSER = "acc_pgd10"
Curves = dict[str, dict[int, float]]


def curves(run: Path) -> Curves:
    """Logged values of a run, by name and epoch, the first epoch being 0; those of a resumed run replace earlier ones."""
    found: Curves = {}
    versions = sorted(run.glob("metrics/version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    for version in versions:
        with (version / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if row.get("epoch") and value and name.startswith(("val", "monitor/")):
                        found.setdefault(name, {})[int(float(row["epoch"]))] = float(value)
    return found


def best_epoch(run: Path) -> int:
    """That of ``best.ckpt``."""
    return int(torch.load(run / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True, mmap=True)["epoch"])


def chosen_weights(found: Curves, epoch: int, monitor: str) -> str:
    """``raw``, or the average that did better under PGD-10 in this epoch, where the run's monitor looks at all of them.

    Args:
        found: see :func:`curves`.
        epoch: that of the checkpoint.
        monitor: ``run.monitor`` of the config: ``val/...`` is about the raw weights alone, ``val_NAME/...`` about that average.
    """
    prefix = monitor.partition("/")[0]
    if prefix != "val_max":
        return prefix.removeprefix("val").removeprefix("_") or "raw"
    best, at = "raw", found[f"val/{CHOOSER}"][epoch]
    for name in sorted(found):
        average = name.removeprefix("val_").removesuffix(f"/{CHOOSER}")
        if name == f"val_{average}/{CHOOSER}" and average != "max" and found[name].get(epoch, -1.0) > at:
            best, at = average, found[name][epoch]
    return best


def collapse(found: Curves) -> int | None:
    """First epoch in which the published rule for catastrophic overfitting holds."""
    fgsm, pgd = found.get("val/acc_fgsm", {}), found.get(f"val/{CHOOSER}", {})
    return next((epoch for epoch in sorted(fgsm) if epoch in pgd and fgsm[epoch] - pgd[epoch] > GAP), None)


def seen(found: Curves) -> int | None:
    """First epoch in which our monitor reported an event."""
    events = found.get("monitor/co_events", {})
    return next((epoch for epoch in sorted(events) if events[epoch] > 0), None)


def validation(found: Curves, weights: str, epoch: int) -> dict[str, float]:
    """PGD-10 accuracy in validation at the tested and at the last epoch, in percent."""
    curve = found[f"val{'' if weights == 'raw' else '_' + weights}/{CHOOSER}"]
    return {"val_best": 100 * curve[epoch], "val_last": 100 * curve[max(curve)]}


def training_cost(cost: Mapping[str, Any]) -> dict[str, float | None]:
    """Of ``compute.json``: passes a sample and in all, seconds, images a second, and peak memory in GiB where it is known."""
    tallies = [network["training"] for network in cost["networks"].values()]
    forwards = sum(tally["forwards"] for tally in tallies)
    backwards = sum(tally["input_backwards"] + tally["weight_backwards"] for tally in tallies)
    samples, seconds, memory = max(cost["samples"], 1), cost["seconds"], cost.get("peak_memory")
    return {
        "forwards": forwards / samples,
        "backwards": backwards / samples,
        "passes": float(forwards + backwards),
        "seconds": seconds,
        "images_per_second": samples / seconds if seconds else None,
        "peak_gib": None if memory is None else memory / 2**30,
    }
