"""How the cost of an attack and of a training step grows, ours beside the plain loop: ``python -m benchmarks.growth``.

One thing is changed at a time, from a base: attack steps, batch size, number of classes, height and width of the images. At
each value a PGD attack in eval mode and a PGD adversarial training step (``benchmarks/training.py``) are timed in interleaved
pairs with ``benchmarks/lean.py``, on random images. A power law is fitted to the medians of each axis, seconds = c * value **
exponent, by least squares of the logarithms; the standard error beside the exponent says how well it holds. Cost that is
proportional has exponent 1, or 2 for height and width together; cost that does not depend on the value has 0. An exponent of
ours above that of lean would say that our share grows with the problem.

The base is small by default, so that a CPU gets through; with a GPU, which small batches do not fill, raise ``--batch-size``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from robust_pl import nets
from robust_pl.callbacks import PGD
from robust_pl.report.plots import COLORS, DPI, INK, tidy

from . import lean
from .timing import Pairs, compare, machine, now, print_machine, unit
from .training import EPS, STEP_SIZE, Batch, ours, random_batch, sgd

AXES = {"steps": "attack steps", "batch": "batch size", "classes": "classes", "size": "height and width"}
VALUES = {"steps": (1, 2, 5, 10), "batch": (8, 16, 32, 64), "classes": (10, 100, 1000), "size": (32, 64, 96, 128)}
WORK = ("attack", "training")
SIDES = ("ours", "lean")


@dataclass(frozen=True)
class Point:
    """A problem: attack steps, batch size, number of classes, height and width of its images."""

    steps: int
    batch: int
    classes: int
    size: int


def measure(point: Point, net: str, pairs: int, device: torch.device) -> dict[str, Pairs]:
    """Times of an attack and of a training step."""
    torch.manual_seed(0)
    made = getattr(nets, net)(num_classes=point.classes, in_channels=3).to(device)
    x, y = random_batch(point.batch, point.size, point.classes, device)
    still, attack = copy.deepcopy(made).eval().requires_grad_(False), PGD(EPS, STEP_SIZE, point.steps)
    by_hand = (x, y, EPS, STEP_SIZE, point.steps)
    return {
        "attack": compare("attack", pairs, lambda: attack(still, x, y), lambda: lean.pgd(still, *by_hand), device),
        "training": _training(made, (x, y), point.steps, pairs, device),
    }


def _training(net: torch.nn.Module, batch: Batch, steps: int, pairs: int, device: torch.device) -> Pairs:
    measured, own = Pairs("training step", pairs), copy.deepcopy(net)
    optimizer = sgd(own.parameters())

    def batches() -> Iterator[Batch]:
        """Hand the Trainer a batch where it is our turn, and train by hand in between."""
        for pair, side in measured.order():
            began = now(device)
            if side == "ours":
                yield batch
            else:
                lean.training_step(own, optimizer, *batch, EPS, STEP_SIZE, steps)
            measured.add(pair, side, now(device) - began)

    ours(net, batches(), pairs + 1, steps)
    return measured


def fit(values: list[int], seconds: list[float]) -> dict[str, float] | None:
    """Exponent of the power law through the points, its standard error, and c; None where there is one point alone."""
    if len(values) < 2:
        return None
    line = stats.linregress(np.log(values), np.log(seconds))
    return {"exponent": float(line.slope), "error": float(line.stderr), "c": float(np.exp(line.intercept))}


def grow(base: Point, axes: Mapping[str, list[int]], net: str, pairs: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Axis -> its values, and of each work the figures at each value and the fit of each side."""
    known: dict[Point, dict[str, dict[str, Any]]] = {}
    found = {}
    for axis, values in axes.items():
        points = [replace(base, **{axis: value}) for value in values]
        for point in points:
            if point not in known:  # the base is on every axis
                known[point] = {work: p.summary() for work, p in measure(point, net, pairs, device).items()}
        found[axis] = {"values": values}
        for work in WORK:
            at = [known[point][work] for point in points]
            law = {side: fit(values, [figures[f"{side}_median_s"] for figures in at]) for side in SIDES}
            found[axis][work] = {"at": at, "fit": law}
    return found


def print_figures(found: Mapping[str, Mapping[str, Any]], title: str, device: torch.device) -> None:
    """Print a row for each value and one for the exponents of each axis."""
    table = Table(title=f"{title}; {unit(device)}")
    for column in ("", "", "attack, ours", "lean", "ratio", "training step, ours", "lean", "ratio"):
        table.add_column(column, justify="right" if len(table.columns) > 1 else "left", no_wrap=True)
    for axis, of in found.items():
        for i, value in enumerate(of["values"]):
            at = [of[work]["at"][i] for work in WORK]
            cells = [
                cell
                for s in at
                for cell in (f"{s['ours_median_s']:.3f}", f"{s['lean_median_s']:.3f}", f"{s['ratio_median']:.3f}")
            ]
            table.add_row(AXES[axis] if i == 0 else "", str(value), *cells)
        laws = [of[work]["fit"] for work in WORK]
        table.add_row("", "exponent", *(cell for law in laws for cell in (_exponent(law["ours"]), _exponent(law["lean"]), "")))
        table.add_section()
    console = Console(width=120)
    console.print(table)
    print_machine(console, device)


def _exponent(law: Mapping[str, float] | None) -> str:
    return "" if law is None else f"{law['exponent']:.2f} ± {law['error']:.2f}"


def draw(found: Mapping[str, Mapping[str, Any]], title: str, device: torch.device) -> Figure:
    """One panel an axis, both scales logarithmic: points are medians, lines the fitted laws."""
    figure = Figure(figsize=(3.4 * len(found), 4.4), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    panels = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for place, (axis, of) in zip(panels, found.items(), strict=True):
        values = np.asarray(of["values"], dtype=float)
        for color, work in zip(COLORS, WORK, strict=False):
            for side, mark, dash in zip(SIDES, ("o", "x"), ("-", "--"), strict=True):
                law = of[work]["fit"][side]
                seconds = [figures[f"{side}_median_s"] for figures in of[work]["at"]]
                label = f"{work}, {side}" + ("" if law is None else f": {law['exponent']:.2f}")
                place.plot(values, seconds, mark, color=color, markersize=5, label=label)
                if law is not None:
                    place.plot(values, law["c"] * values ** law["exponent"], dash, color=color, linewidth=1.3)
        place.set_xscale("log", base=2 if axis != "classes" else 10)
        place.set_yscale("log")
        place.set_xticks(values, [f"{value:g}" for value in values])
        place.minorticks_off()
        place.set_title(AXES[axis], loc="left", fontsize=10, color=INK)
        tidy(place)
        place.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        place.legend(
            frameon=False,
            fontsize=7.5,
            loc="upper left",
            bbox_to_anchor=(0, -0.08),
            title="with the exponent",
            title_fontsize=7.5,
            alignment="left",
        )
    panels[0].set_ylabel(unit(device))
    return figure


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description="Cost against the size of the problem.")
    for axis, values in VALUES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=list(values), help=f"{AXES[axis]} to measure")
    for axis, value in {"steps": 5, "batch": 16, "classes": 10, "size": 32}.items():
        parser.add_argument(f"--base-{axis}", type=int, default=value, help=f"{AXES[axis]} on the other axes")
    parser.add_argument("--axes", nargs="+", choices=tuple(AXES), default=list(AXES))
    parser.add_argument("--pairs", type=int, default=3, help="measured pairs at each point, after one for warming up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "PreActResNet18", "ResNet50", "SmallCNN"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there, such as growth.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    for name in ("pairs", "threads", *(f"base_{axis}" for axis in AXES)):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for axis in AXES:
        if min(values := getattr(args, axis)) < 1 or sorted(set(values)) != values:
            parser.error(f"--{axis} must be whole numbers of at least 1, each larger than the one before")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, draw, and write the JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    base = Point(*(getattr(args, f"base_{axis}") for axis in AXES))
    found = grow(base, {axis: getattr(args, axis) for axis in args.axes}, args.net, args.pairs, device)
    others = ", ".join(f"{AXES[axis]} {value}" for axis, value in asdict(base).items())
    title = f"{args.net}, fp32, from {others}: medians of {args.pairs} pairs"
    print_figures(found, title, device)
    if args.plot is not None:
        draw(found, title, device).savefig(args.plot)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "plot")}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine(device), "axes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
