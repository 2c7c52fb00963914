"""Figures. They are drawn without pyplot, so nobody's backend, style or open figures change."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .curve import TOLERANCE, Curve
from .summary import CLEAN, WORST, Line
from .units import SYMBOLS

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, _PALE, GREY = "#222222", "#9CC4DE", "#8A8A8A"
_RAW = {"linestyle": "--", "linewidth": 1.1}
_RISE = {"linestyle": "none", "marker": "^", "markersize": 8, "color": "#C00000"}
DPI = 160


def plot_curves(curves: Sequence[Curve], title: str = "Robust accuracy over the radius") -> Figure:
    """Accuracy in per cent over the radius, with its 95 % interval as a band; several runs over each other.

    Solid: what stands at this radius and all smaller ones. Dashed, where it differs: the raw accuracy under the attack.
    Triangles: the raw accuracy rises, which hints at gradient masking.

    Args:
        curves: at least one, all in one norm.
        title: of the figure.

    Raises:
        ValueError: if there is no curve, or their norms differ.
    """
    norms = {curve.norm for curve in curves}
    if len(norms) != 1:
        raise ValueError(f"curves share one plot if they share one norm, got {', '.join(sorted(norms)) or 'no curve'}")
    norm = norms.pop()
    scale = 255 if norm == "linf" else 1
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        _draw(axes, curve, [scale * eps for eps in curve.eps], COLORS[i % len(COLORS)])
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(f"{SYMBOLS.get(norm, norm)} radius ε" + (" in units of 1/255" if scale == 255 else ""))
    axes.set_ylabel("accuracy in %")
    largest = scale * max(curve.eps[-1] for curve in curves)
    axes.set_xlim(0, 1.03 * largest or 1)
    axes.set_ylim(0, 100)
    tidy(axes)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    if any(curve.raw != curve.standing for curve in curves):
        axes.plot([], [], color=GREY, label="at this radius alone", **_RAW)
    if any(curve.rises for curve in curves):
        axes.plot([], [], label=f"rises by more than {TOLERANCE:.0%}: check for gradient masking", **_RISE)
    axes.legend(loc="best", fontsize=9, facecolor="white", edgecolor="none", framealpha=0.9)
    return figure


def _draw(axes: Axes, curve: Curve, x: list[float], color: str) -> None:
    percent = [100 * a for a in curve.accuracy]
    low, high = zip(*((100 * a, 100 * b) for a, b in curve.intervals), strict=True)
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    label = f"{curve.name} ({curve.total:,} samples)"
    axes.plot(x, percent, color=color, marker="o", markersize=4, linewidth=1.8, label=label, clip_on=False, zorder=3)
    raw = [100 * a for a in curve.raw_accuracy]
    if curve.raw != curve.standing:
        axes.plot(x, raw, color=color, **_RAW)
    for at, value, eps in zip(x, raw, curve.eps, strict=True):
        if eps in curve.rises:
            axes.plot(at, value, **_RISE, zorder=4, clip_on=False)


def plot_summary(lines: Sequence[Line], title: str = "Accuracy under attack") -> Figure:
    """A bar for each line: accuracy with its 95 % interval, and a tick where the worst case over all attacks so far stands.

    Args:
        lines: see :func:`robust_pl.report.summarise`.
        title: of the figure.
    """
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(lines)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for y, line in enumerate(lines):
        color = GREY if line.name == CLEAN else COLORS[1] if line.name == WORST else _PALE if line.part else COLORS[0]
        low, high = line.interval
        share = 100 * line.accuracy
        axes.barh(y, share, height=0.45 if line.part else 0.68, color=color)
        # At 0 and 100 % rounding could make a length negative.
        lengths = [[max(0, share - 100 * low)], [max(0, 100 * high - share)]]
        axes.errorbar(share, y, xerr=lengths, color=INK, linewidth=1, capsize=2.5)
        if line.standing != line.right:
            worst = 100 * line.standing / line.total
            axes.plot([worst, worst], [y - 0.36, y + 0.36], color=COLORS[1], linewidth=2.2, solid_capstyle="butt")
        axes.text(100 * high + 1.2, y, f"{share:.2f}", va="center", fontsize=9, color=INK)
    if any(line.part for line in lines):
        axes.barh(0, 0, color=_PALE, label="after that part of the attack")
    if any(line.standing != line.right for line in lines):
        axes.plot([], [], color=COLORS[1], linewidth=2.2, label="worst case so far")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    tidy(axes)
    axes.tick_params(axis="y", length=0)
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontsize(8 if line.part else 9.5)
        label.set_color(GREY if line.part else INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"accuracy in % of {lines[0].total:,} samples, with 95 % intervals")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def tidy(axes: Axes) -> None:
    """The look that all figures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK)
    axes.set_axisbelow(True)


def as_image(figure: Figure) -> Image.Image:
    """The figure as a picture in RGB."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return Image.open(buffer).convert("RGB")


def save(figure: Figure, path: Path) -> Image.Image:
    """Write the figure as PNG, and return the picture for loggers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = as_image(figure)
    image.save(path)
    return image
