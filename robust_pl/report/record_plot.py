"""A picture of a record: its curves and heat maps below each other."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import COLORS, DPI, INK, tidy
from .record import HeatMap, Lines, Record

_MANY = 16
"""More fields than this in a row are not filled with numbers."""
_LABELLED = 20
"""More than this are not labelled one by one."""


def plot_record(record: Record) -> Figure | None:
    """Draw what can be drawn; None where there are neither curves nor maps."""
    parts = [*record.lines, *record.maps]
    if not parts:
        return None
    heights = [3.6 if isinstance(part, Lines) else 1.4 + min(0.3 * len(part.y), 4.6) for part in parts]
    figure = Figure(figsize=(7.2, sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, place in zip(parts, axes, strict=True):
        if isinstance(part, Lines):
            draw_lines(place, part)
        else:
            draw_map(figure, place, part)
        place.set_title(part.title, loc="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def draw_lines(axes: Axes, part: Lines) -> None:
    """Draw curves."""
    numeric = all(isinstance(x, int | float) for x in part.x)
    x = part.x if numeric else range(len(part.x))
    for i, (name, values) in enumerate(part.lines.items()):
        y = _floats(values) * (100 if part.share else 1)
        style = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":")[i // len(COLORS) % 3]}
        axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, label=name, **style)
    if not numeric:
        axes.set_xticks(list(x), part.x, rotation=45, ha="right")
    if part.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(part.x_label)
    axes.set_ylabel(f"{part.y_label} in %" if part.share else part.y_label)
    if part.share:
        axes.set_ylim(-2, 102)
    tidy(axes)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    if len(part.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_map(figure: Figure, axes: Axes, part: HeatMap) -> None:
    """Draw a heat map; small ones with their numbers."""
    values = np.stack([_floats(row) for row in part.values]) * (100 if part.share else 1)
    limits = {"vmin": 0, "vmax": 100} if part.share else {}
    drawn = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
    label = f"{part.value_label} in %" if part.share else part.value_label
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.9)
    for axis, names in ((axes.xaxis, part.x), (axes.yaxis, part.y)):
        step = 1 if len(names) <= _LABELLED else -(-len(names) // _MANY)
        first = names.index(0) % step if 0 in names else 0
        axis.set_ticks(range(first, len(names), step), [str(name) for name in names[first::step]], fontsize=8)
    if len(part.x) <= _MANY:
        middle = float(np.nanmean([drawn.norm.vmin, drawn.norm.vmax]))
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if np.isfinite(value):
                    ink = "white" if value < middle else "black"
                    axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlabel(part.x_label)
    axes.set_ylabel(part.y_label)


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
