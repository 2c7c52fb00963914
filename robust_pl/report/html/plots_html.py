"""Plotly figures as JSON. Colours of text and grid are the page's, which knows whether it is dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from ..plots import COLORS
from .blocks import Plot

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
_ROW, _MANY = 26, 16
Series = tuple[str, int, int, list[Any], list[float | None]]
"""A curve: name, number that chooses the colour, number that chooses the dash, x, y."""

Point = tuple[str, int, float, float]
"""Label, number that chooses the colour, x and y."""


def bars(title: str, names: Sequence[str], series: Sequence[tuple[str, int, list[Any]]], axis: str = "accuracy in %") -> Plot:
    """A group of bars for each name.

    Args:
        title: of the plot.
        names: of the groups.
        series: label, number that chooses the colour, and for each group a value in per cent, or value, low and high, or None.
        axis: label of the values.
    """
    traces = []
    for label, place, values in series:
        ends = [value if isinstance(value, tuple) else (value, None, None) for value in values]
        traces.append(
            {
                "type": "bar",
                "name": plain(label),
                "x": [plain(name) for name in names],
                "y": [middle for middle, _, _ in ends],
                "marker": {"color": color(place), "pattern": {"shape": "/" if place >= len(COLORS) else ""}},
                "hovertemplate": "%{x}: %{y:.2f}<extra>%{fullData.name}</extra>",
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [None if high is None else max(0.0, high - middle) for middle, _, high in ends],
                    "arrayminus": [None if low is None else max(0.0, middle - low) for middle, low, _ in ends],
                    "thickness": 1.2,
                    "width": 3,
                },
            }
        )
    layout = {
        "barmode": "group",
        "bargap": 0.2 if len(names) * len(series) > 4 else 0.6,
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": plain(axis)}, "range": [0, 102] if "%" in axis else None},
    }
    of = ", ".join(label for label, _, _ in series)
    said = f"Bars: {title}, of {of} for {', '.join(map(str, names))}. The table holds the numbers."
    return _plot(title, traces, layout, said, 360, wide=len(names) * len(series) > 12)


def curves(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    share: bool = False,
    log_x: bool = False,
) -> Plot:
    """Curves over one axis; names on it are equally far apart."""
    numeric = all(isinstance(x, int | float) for _, _, _, xs, _ in series for x in xs)
    traces = []
    for name, place, dash, xs, ys in series:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(xs) <= 60 else "lines",
                "name": plain(name),
                "x": [x if numeric else plain(str(x)) for x in xs],
                "y": [None if y is None else 100 * y if share else y for y in ys],
                "line": {"color": color(place), "dash": _DASHES[dash % len(_DASHES)], "width": 2},
                "marker": {"size": 5, "symbol": _SYMBOLS[place // len(COLORS) % len(_SYMBOLS)]},
                "hovertemplate": "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": plain(x_label)}, **_scale(numeric, log_x, [x for *_, xs, _ in series for x in xs])},
        "yaxis": {
            "title": {"text": plain(f"{y_label} in %" if share else y_label)},
            "range": [-2, 102] if share else None,
        },
        "showlegend": len(series) > 1,
    }
    said = f"Curves: {title}; {y_label} over {x_label}, of {', '.join(name for name, *_ in series)}."
    return _plot(title, traces, layout, said, 340)


def heat(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[Any],
    y: Sequence[Any],
    values: Sequence[Sequence[float | None]],
    label: str,
    limits: tuple[float, float] | None,
    share: bool = False,
) -> Plot:
    """A heat map, the first row above; small ones with their numbers.

    Args:
        title: of the plot.
        x_label: of the columns.
        y_label: of the rows.
        x: of each column.
        y: of each row.
        values: rows.
        label: what the values are.
        limits: ends of the colours, so that maps beside each other can be compared; None takes those of the values.
        share: values are shares, which are shown in per cent.
    """
    scale = 100 if share else 1
    shown = [[None if value is None else scale * value for value in row] for row in values]
    few = len(x) <= _MANY and len(y) <= 40
    columns, rows = _distinct(x), _distinct(y)
    trace = {
        "type": "heatmap",
        "x": list(range(len(x))),
        "y": list(range(len(y))),
        "z": shown,
        "colorscale": "Viridis",
        "texttemplate": "%{z:.3~g}" if few else None,
        "customdata": [[f"{row}, {column}" for column in columns] for row in rows],
        "hovertemplate": "%{customdata}: %{z:.4g}<extra></extra>",
        "hoverongaps": False,
        "colorbar": {"title": {"text": plain(f"{label} in %" if share else label), "side": "right"}, "thickness": 12},
    }
    if limits is not None and all(map(math.isfinite, limits)) and limits[0] < limits[1]:
        trace |= {"zmin": scale * limits[0], "zmax": scale * limits[1]}
    layout = {
        "xaxis": {"title": {"text": plain(x_label)}, "showgrid": False, **_ticks(columns)},
        "yaxis": {"title": {"text": plain(y_label)}, "autorange": "reversed", "showgrid": False, **_ticks(rows)},
    }
    said = f"Heat map: {title}; {label or 'values'} by {y_label or 'row'} and {x_label or 'column'}, {len(y)} by {len(x)}."
    return _plot(title, [trace], layout, said, min(max(260, 130 + _ROW * len(y)), 620), wide=few and len(x) > 10)


def points(title: str, x_label: str, y_label: str, series: Sequence[Point], log_x: bool = False) -> Plot:
    """A point for each label: number that chooses the colour, x and y."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(label),
            "x": [x],
            "y": [y],
            "marker": {"size": 13, "color": color(place), "symbol": _SYMBOLS[place // len(COLORS) % len(_SYMBOLS)]},
            "hovertemplate": "%{x:.4g}, %{y:.2f}<extra>%{fullData.name}</extra>",
        }
        for label, place, x, y in series
    ]
    layout = {
        "xaxis": {"title": {"text": plain(x_label)}, **_scale(True, log_x, [x for *_, x, _ in series])},
        "yaxis": {"title": {"text": plain(y_label)}, "rangemode": "tozero"},
        "showlegend": True,
    }
    said = f"Points: {title}; " + ", ".join(f"{label} at {x:.4g} and {y:.4g}" for label, _, x, y in series)
    return _plot(title, traces, layout, said, 360)


def color(place: int) -> str:
    """Of a run; colours start again after the last."""
    return COLORS[place % len(COLORS)]


def plain(text: str) -> str:
    """Plotly takes some tags for its own; none of ours are meant."""
    return html.escape(str(text), quote=False)


def _plot(title: str, traces: list[dict[str, Any]], layout: dict[str, Any], alt: str, height: int, wide: bool = False) -> Plot:
    import plotly.graph_objects as go

    figure = go.Figure(traces, {"template": None, "height": height, **layout})  # which refuses what plotly does not know
    # So that no text can end the element that holds the figure.
    return Plot(title, figure.to_json().replace("<", "\\u003c"), alt, height, wide)


def _scale(numeric: bool, log: bool, x: Sequence[Any]) -> dict[str, Any]:
    """Names, a logarithm with few numbers on it, or whole numbers where all are such."""
    if not numeric:
        return {"type": "category"}
    if log:
        ticks = [digit * 10.0**power for power in range(-12, 13) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if 0.8 * min(x) <= tick <= 1.25 * max(x)] if x and min(x) > 0 else []
        return (
            {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
            if len(ticks) > 1
            else {"type": "log"}
        )
    few = x and all(float(one).is_integer() for one in x) and 0 < max(x) - min(x) <= 8
    return {"type": "linear", "dtick": 1 if few else None}


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    step = max(1, -(-len(names) // (2 * _MANY)))
    return {"tickmode": "array", "tickvals": list(range(0, len(names), step)), "ticktext": list(names[::step])}


def _distinct(names: Sequence[Any]) -> list[str]:
    return [plain(f"{name:.4g}" if isinstance(name, float) else name) for name in names]
