"""Accuracy on the view sphere, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plots import DPI, GREY, INK
from .view_bins import ViewBins
from .view_components import Component

FEW = 5
"""Fields with fewer views are marked, as their accuracy says little."""
OUTLINES = 40
"""Of more components only so many, those of most weight, get their ellipse, or none could be told from another."""
_MARKERS = (("o", "#FFFFFF"), ("D", "#FF9D5C"), ("^", "#FFB3E6"), ("s", "#C8C8C8"))
_FINE = 6


def plot_view_sphere(
    bins: ViewBins,
    overlays: Mapping[str, Sequence[Component]] | None = None,
    title: str = "Accuracy by viewpoint",
) -> Figure:
    """A heat map of the accuracy over azimuth and elevation, in Mollweide's projection, which keeps areas.

    Fields without a view stay white; a cross marks those with fewer than ``FEW`` views, unless all are such. Components of
    mixtures lie over it: a point at the mean, whose area is its weight within its mixture, and its one-sigma ellipse.

    Args:
        bins: counted views.
        overlays: name of an attack -> places that it found, of all objects.
        title: of the figure.
    """
    figure = Figure(figsize=(7.2, 4.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(projection="mollweide")
    # Cells are drawn with straight sides, so that large ones would show corners where the meridians bend.
    shares = np.kron(np.ma.masked_invalid(bins.accuracy).filled(np.nan), np.ones((_FINE, _FINE)))
    edges = [np.deg2rad(_finer(ends)) for ends in (bins.azimuth, bins.elevation)]
    heat = axes.pcolormesh(*edges, 100 * np.ma.masked_invalid(shares), cmap="viridis", vmin=0, vmax=100, rasterized=True)
    few = (bins.total > 0) & (bins.total < FEW)
    handles = []
    if few.any() and (bins.total >= FEW).any():
        row, column = few.nonzero()
        handles += axes.plot(
            np.deg2rad(_middles(bins.azimuth)[column]),
            np.deg2rad(_middles(bins.elevation)[row]),
            linestyle="none",
            marker="x",
            markersize=3.5,
            markeredgewidth=0.8,
            color=GREY,
            label=f"fewer than {FEW} views",
        )
    for number, (name, places) in enumerate((overlays or {}).items()):
        if places:
            handles.append(_overlay(axes, name, places, *_MARKERS[number % len(_MARKERS)]))
    _degrees(axes)
    bar = figure.colorbar(heat, ax=axes, orientation="horizontal", shrink=0.6, aspect=34, pad=0.03)
    bar.set_label("accuracy in %; white: not seen", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    bar.outline.set_visible(False)
    if handles:
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(-0.05, 1.06), frameon=False, fontsize=8, handletextpad=0.4
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def describe_bins(bins: ViewBins) -> str:
    """Mean, worst field and number of views, in a sentence for a caption."""
    if not bins.covered:
        return "No view."
    row, column = bins.worst
    seen = bins.total[bins.total > 0]
    views = f"{seen.min()} to {seen.max()}" if seen.min() < seen.max() else f"{seen.min()}"
    return (
        f"{bins.mean:.1%} over the area seen, {bins.covered} of {bins.total.size} fields with {views} views each. Worst: "
        f"{bins.accuracy[row, column]:.1%} of {bins.total[row, column]} views at azimuth {bins.azimuth[column]:g} to "
        f"{bins.azimuth[column + 1]:g}, elevation {bins.elevation[row]:g} to {bins.elevation[row + 1]:g} degrees."
    )


def _overlay(axes: Axes, name: str, places: Sequence[Component], marker: str, color: str) -> Line2D:
    heaviest = sorted(places, key=lambda place: -place.weight)[:OUTLINES]
    curves = [_unbroken(place.outline) for place in heaviest if place.outline is not None]
    for curve in curves:
        for width, shade in ((2.0, INK), (1.0, color)):  # a dark rim, so that it shows on every colour
            axes.plot(*np.deg2rad(curve).T, color=shade, linewidth=width, alpha=0.8, solid_capstyle="round", zorder=3)
    where = np.deg2rad([(place.azimuth, place.elevation) for place in places])
    sizes = [6 + 54 * place.weight for place in places]
    axes.scatter(*where.T, s=sizes, marker=marker, facecolor=color, edgecolor=INK, linewidth=0.7, zorder=4)
    look = {"marker": marker, "markersize": 5, "markerfacecolor": color, "markeredgecolor": INK, "markeredgewidth": 0.7}
    return Line2D([], [], linestyle="none", label=name, **look)


def _unbroken(outline: np.ndarray) -> np.ndarray:
    """The curve with gaps where it leaves the map on one side and comes back on the other."""
    leaves = np.flatnonzero(np.abs(np.diff(outline[:, 0])) > 180) + 1
    return np.insert(outline, leaves, np.nan, axis=0)


def _degrees(axes: Axes) -> None:
    """Parallels and meridians, named."""
    longitudes, latitudes = range(-120, 121, 60), range(-60, 61, 30)
    axes.set_xticks(np.deg2rad(longitudes), [f"{angle}°" for angle in longitudes])
    axes.set_yticks(np.deg2rad(latitudes), [f"{angle}°" for angle in latitudes])
    axes.tick_params(axis="x", labelsize=7.5, labelcolor=INK)
    axes.tick_params(axis="y", labelsize=7.5, labelcolor=INK)
    axes.grid(color=GREY, linewidth=0.5, alpha=0.4)
    for label in axes.get_xticklabels():
        label.set_bbox({"facecolor": "white", "alpha": 0.65, "edgecolor": "none", "pad": 0.8})
    axes.spines["geo"].set_color(GREY)


def _middles(edges: np.ndarray) -> np.ndarray:
    return (edges[1:] + edges[:-1]) / 2


def _finer(edges: np.ndarray) -> np.ndarray:
    steps = np.arange(_FINE) / _FINE
    return np.append((edges[:-1, None] + np.diff(edges)[:, None] * steps).ravel(), edges[-1])
