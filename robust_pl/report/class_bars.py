"""The picture of :mod:`robust_pl.report.classes`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .classes import MANY, Classes, class_name, in_order
from .plots import COLORS, DPI, GREY, INK, tidy
from .summary import CLEAN, WORST


def plot_classes(columns: Sequence[Classes], names: Sequence[str] | None = None, title: str = "Accuracy by class") -> Figure:
    """A group of bars for each class, clean and under each attack, and a line where the worst case over all of them stands.

    Of more than 20 classes the 20 that fare worst are drawn, and the axis says so.

    Args:
        columns: see :func:`robust_pl.report.classes.count_classes`.
        names: of the classes; None shows their numbers.
        title: of the figure.
    """
    shown = in_order(columns)[:MANY]
    bars = [column for column in columns if column.name != WORST]
    places, width = range(len(shown)), 0.8 / len(bars)
    figure = Figure(figsize=(max(4.8, 1.6 + 0.48 * len(shown)), 3.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    drawn = []
    for i, column in enumerate(bars):
        color = GREY if column.name == CLEAN else COLORS[(i - 1) % len(COLORS)]
        hatch = "////" if i > len(COLORS) else None  # the colours start again
        left = [place - 0.4 + (i + 0.5) * width for place in places]
        heights = [100 * column.accuracy[k] for k in shown]
        drawn.append(axes.bar(left, heights, width, color=color, hatch=hatch, edgecolor="white", linewidth=0))
    if len(bars) > 2:  # that of one attack is its own, but for what is wrong when clean
        worst = [100 * columns[-1].accuracy[k] for k in shown]
        ends = [place - 0.44 for place in places], [place + 0.44 for place in places]
        drawn.append(axes.hlines(worst, *ends, color=INK, zorder=4, clip_on=False))
    tidy(axes)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.tick_params(axis="x", length=0)
    labels = [class_name(columns[0].classes[k], names) for k in shown]
    turned = max(map(len, labels)) > 5
    axes.set_xticks(places, labels, fontsize=9, rotation=40 * turned, ha="right" if turned else "center")
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy in %")
    count = len(columns[0].classes)
    if count > MANY:
        by = "in the worst case" if len(columns) > 1 else "on clean images"
        axes.set_xlabel(f"{MANY} of {count} classes, those of the lowest accuracy {by}")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    said = [*(column.name for column in bars), WORST][: len(drawn)]
    figure.legend(drawn, said, loc="outside upper right", frameon=False, fontsize=8.5, ncols=min(len(said), 4))
    return figure
