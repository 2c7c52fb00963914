"""A plot of robust accuracy against what training cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

import matplotlib

from .fast_at_table import ATTACKS, Seeds, ranked, robust

AXES = {"passes": "forward and backward passes in training, millions of images", "seconds": "seconds of training"}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "cifar10_cpu": "CIFAR-10, on CPU"}


def plot(rows: Mapping[str, Seeds], axis: str, dataset: str, path: Path) -> None:
    """One point a method, mean of its seeds, with bars of one standard deviation; names stand in order at the right.

    Args:
        rows: figures of every seed, by the row's name.
        axis: a key of :data:`AXES`.
        dataset: for the title.
        path: of the PNG.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    # Methods that were tested by another attack than the most robust one have no place beside it.
    names = [name for name in ranked(rows) if robust(rows[name])[0] == robust(rows[ranked(rows)[0]])[0]]
    attack, seeds = robust(rows[names[0]])[0], len(rows[names[0]])
    scale = 1e-6 if axis == "passes" else 1.0
    heights = {name: [seed[attack] for seed in rows[name]] for name in names}
    names.sort(key=lambda name: -mean(heights[name]))
    costs = {name: scale * mean(seed[axis] for seed in rows[name]) for name in names}
    figure, plane = plt.subplots(figsize=(9, max(4.0, 0.27 * len(names) + 1.2)), layout="constrained")
    colours = plt.get_cmap("turbo")
    middles = [mean(heights[name]) for name in names]
    room = max(0.06 * (middles[0] - middles[-1]), 0.5)
    low, high = middles[-1] - room, middles[0] + room  # of means: the bar of a method that collapses now and then is cut off
    places = label_places([(middle - low) / (high - low) for middle in middles])
    for i, name in enumerate(names):
        values, colour = heights[name], colours(0.05 + 0.9 * i / max(len(names) - 1, 1))
        bar = stdev(values) if len(values) > 1 else 0.0
        plane.errorbar(costs[name], mean(values), yerr=bar, marker="o", markersize=6, color=colour, capsize=2, zorder=3)
        plane.annotate(
            f"{name}  {mean(values):.1f}",
            (costs[name], mean(values)),
            xytext=(1.04, places[i]),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 2},
        )
    plane.set_xscale("log")
    for part in (plane.xaxis.set_major_formatter, plane.xaxis.set_minor_formatter):
        part(FuncFormatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "12357" else ""))
    plane.set(ylim=(low, high), xlabel=AXES[axis], ylabel=f"accuracy under {ATTACKS[attack]}, %")
    plane.set_title(f"{TITLES[dataset]}: robust accuracy against training cost, {seeds} seed{'s' * (seeds > 1)}")
    plane.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_places(heights: list[float]) -> list[float]:
    """Where names stand, as fractions of the axes: near their points' heights, which fall, without touching each other."""
    gap = min(0.042, 1 / max(len(heights), 1))
    places: list[float] = []
    for height in heights:
        places.append(min(height, places[-1] - gap) if places else min(height, 1.0))
    # What went below the axes moves up again, and pushes those above.
    floor = 0.0
    for i in reversed(range(len(places))):
        places[i] = max(places[i], floor)
        floor = places[i] + gap
    return places
