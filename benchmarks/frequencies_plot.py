"""Figures of several networks side by side, by frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_pl.report import Record
from robust_pl.report.plots import COLORS, DPI, INK, tidy

Records = Mapping[str, Sequence[Record]]


def plot_filters(titles: Mapping[str, str], records: Records) -> Figure:
    """Accuracy with the central r x r frequencies alone and without them, on clean and on attacked images."""
    figure = Figure(figsize=(11, 7.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for row, (part, says) in enumerate(((0, "central r x r frequencies alone"), (1, "without the central r x r"))):
        for column, input_ in enumerate(("clean", "PGD-20")):
            place = axes[row, column]
            for i, (name, of) in enumerate(records.items()):
                lines = of[0].lines[part]
                values = [100 * value for value in lines.lines[input_]]
                place.plot(lines.x, values, marker="o", markersize=4, linewidth=1.8, color=COLORS[i], label=titles[name])
            place.set_title(f"{input_}, {says}", loc="left", fontsize=10, fontweight="bold", color=INK)
            place.set_xlabel("r")
            place.invert_xaxis()
            place.set_xticks(lines.x)
            tidy(place)
            place.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes[row, 0].set_ylabel("accuracy in %")
    axes[0, 1].legend(frameon=False, fontsize=8.5)
    return figure


def plot_maps(titles: Mapping[str, str], records: Records) -> Figure:
    """Error rate under each wave, one map a network, and its mean by distance from the centre."""
    figure, rest = _pictures(titles, records, 2, "error rate in % under a wave")
    for i, of in enumerate(records.values()):
        rest.plot([100 * value for value in of[2].lines[0].lines["with a wave"]], color=COLORS[i], linewidth=1.8)
        rest.axhline(100 * of[2].figures["clean"], color=COLORS[i], linewidth=1, linestyle=":")
    _label(rest, "by distance; dotted: without a wave", "error rate in %", titles, records)
    return figure


def plot_spectra(titles: Mapping[str, str], records: Records) -> Figure:
    """Mean |F| of what PGD-20 adds, each map relative to its largest value, and the energy up to each distance."""
    figure, rest = _pictures(titles, records, 1, "mean |F| of PGD-20 in % of the largest")
    for i, of in enumerate(records.values()):
        rest.plot(100 * np.cumsum(of[1].lines[0].lines["perturbation"]), color=COLORS[i], linewidth=1.8)
    _label(rest, "energy of PGD-20 up to a distance", "% of the energy", titles, records)
    return figure


def _label(axes: Axes, title: str, y_label: str, titles: Mapping[str, str], records: Records) -> None:
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
    axes.set_xlabel("cycles an image")
    axes.set_ylabel(y_label)
    axes.legend(axes.lines[:: len(axes.lines) // len(records)], [titles[name] for name in records], frameon=False, fontsize=6.5)
    tidy(axes)


def _pictures(titles: Mapping[str, str], records: Records, which: int, label: str) -> tuple[Figure, Axes]:
    """A map for each network, in per cent, and the place behind them."""
    count = len(records) + 1
    rows = -(-count // 3)
    figure = Figure(figsize=(11, 3.6 * rows), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2)  # square maps are narrower than their places
    axes = figure.subplots(rows, min(3, count), squeeze=False).flatten()
    for place, (name, of) in zip(axes, records.items(), strict=False):
        picture = of[which].maps[0]
        values = np.array(picture.values)
        values = 100 * (values if picture.share else values / values.max())
        ends = (picture.x[0] - 0.5, picture.x[-1] + 0.5, picture.y[-1] + 0.5, picture.y[0] - 0.5)
        drawn = place.imshow(values, cmap="viridis", vmin=0, vmax=100, extent=ends, interpolation="nearest")
        place.set_title(titles[name], loc="left", fontsize=9, fontweight="bold", color=INK)
        place.set_xticks(range(-12, 13, 6))
        place.set_yticks(range(-12, 13, 6))
        place.tick_params(labelsize=8)
    for place in axes[count:]:
        place.set_axis_off()
    figure.colorbar(drawn, ax=list(axes), label=label, shrink=0.7)
    return figure, axes[count - 1]
