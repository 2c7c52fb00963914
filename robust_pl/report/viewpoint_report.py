"""The report of one viewpoint attack, beside the images that it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.view_images import ViewImages
from ..functional.viewpoints import azimuth_and_elevation, camera_to_world
from ..scenes.view_space import NAMES
from .contact_sheet import draw_contact_sheet
from .markdown import rows
from .pictures import Caption
from .plots import save
from .view_bins import ViewBins
from .view_components import Component
from .view_sphere import FEW, describe_bins, plot_view_sphere

MANY = 48
"""Of more objects those of the lowest accuracy are shown; the table ``views.csv`` holds all."""
_FIGURES = (
    ("acc", "accuracy under the distribution", "{:.2%}"),
    ("worst_class", "the same of the class in which it is lowest", "{:.2%}"),
    ("center_acc", "accuracy at the means of the components", "{:.2%}"),
    ("worst_view", "objects right at their worst view", "{:.2%}"),
    ("reached", "views taken for the target", "{:.2%}"),
    ("view_loss", "mean cross-entropy", "{:.3f}"),
    ("entropy", "entropy, relative to the uniform distribution", "{:.2f} nats"),
    ("coverage", "fields of 30 x 15 degrees that an object's views fall into", "{:.1f} of 144"),
    ("renders", "renders", "{:,.0f}"),
    ("renders_per_second", "renders a second and process", "{:,.0f}"),
)
_SYMBOLS = {"gamma": "γ", "theta": "θ", "phi": "φ", "r": "r", "x": "x", "y": "y"}  # noqa: RUF001


def write_viewpoint_report(
    folder: Path,
    name: str,
    figures: Mapping[str, float],
    components: Sequence[Component] = (),
    loggers: Iterable[Any] = (),
) -> Path:
    """Write ``report.md``, ``images/worst_views.png`` and ``images/view_sphere.png``; returns the path of the first.

    Args:
        folder: an evaluation folder as :class:`robust_pl.data.ViewImages` reads it.
        name: of the attack.
        figures: ``acc``, ``worst_class``, ``center_acc``, ``worst_view``, ``reached``, ``view_loss``, ``entropy``,
            ``coverage``, ``renders`` and ``renders_per_second``, as far as they are known.
        components: of what was found, of all objects, see :func:`robust_pl.report.mixture_components`.
        loggers: those that have ``log_image``, as wandb's has, get the pictures as ``test/worst_views_<name>`` and
            ``test/view_sphere_<name>``.
    """
    fresh, worst = ViewImages(folder), ViewImages(folder, "worst")
    names = fresh.about["class_names"]
    right = (fresh.column("prediction") == fresh.labels).numpy()
    bins = ViewBins.count(*azimuth_and_elevation(camera_to_world(_view(fresh))), right)
    objects = _objects(fresh, worst, right)
    sphere = plot_view_sphere(bins, {name: components}, f"Accuracy of fresh views from {name}")
    pictures = {
        "worst_views": _sheet(worst, [place for place, _, _ in objects[:MANY]], names),
        "view_sphere": save(sphere, folder / "images/view_sphere.png"),
    }
    pictures["worst_views"].save(folder / "images/worst_views.png")
    for logger in loggers:
        if hasattr(logger, "log_image"):
            for key, picture in pictures.items():
                logger.log_image(f"test/{key}_{name}", [picture])
    path = folder / "report.md"
    path.write_text(_markdown(name, figures, fresh, worst, objects, bins, names), encoding="utf-8")
    return path


def _view(images: ViewImages) -> Tensor:
    """Viewpoints (V, 6) of the rows."""
    return torch.stack([images.column(key) for key in NAMES], 1)


def _objects(fresh: ViewImages, worst: ViewImages, right: np.ndarray) -> list[tuple[int, float, int]]:
    """Row of its worst view, accuracy and covered fields of each object, those of the lowest accuracy first.

    Of equal ones, that of the highest loss at its worst view.
    """
    azimuth, elevation = azimuth_and_elevation(camera_to_world(_view(fresh)))
    belongs = np.array([row["object"] for row in fresh.rows])
    found = []
    for place, row in enumerate(worst.rows):
        own = belongs == row["object"]
        found.append((place, float(right[own].mean()), ViewBins.count(azimuth[own], elevation[own], right[own]).covered))
    loss = worst.column("loss").tolist()
    return sorted(found, key=lambda of: (of[1], -loss[of[0]]))


def _sheet(worst: ViewImages, places: Sequence[int], names: Sequence[str] | None) -> Image.Image:
    images = [worst.sample(place, None)[0].float() / 255 for place in places]
    return draw_contact_sheet(images, [_caption(worst.rows[place], names) for place in places])


def _caption(row: Mapping[str, str], names: Sequence[str] | None) -> list[Caption]:
    right = row["label"] == row["prediction"]
    angles, position = _said_view(row)
    return [
        (row["object"], True),
        (f"{_class(row['label'], names)} → {_class(row['prediction'], names)}", right),
        (f"loss {float(row['loss']):.3g}", True),
        (angles, True),
        (position, True),
    ]


def _said_view(row: Mapping[str, str]) -> tuple[str, str]:
    """Angles, and distance with shifts."""
    value = {key: float(row[key]) for key in NAMES}
    angles = " ".join(f"{_SYMBOLS[key]} {value[key]:.0f}°" for key in ("gamma", "theta", "phi"))
    return angles, " ".join(f"{_SYMBOLS[key]} {value[key]:.2f}" for key in ("r", "x", "y"))


def _class(label: str, names: Sequence[str] | None) -> str:
    return label if names is None else str(names[int(label)])


def _markdown(
    name: str,
    figures: Mapping[str, float],
    fresh: ViewImages,
    worst: ViewImages,
    objects: Sequence[tuple[int, float, int]],
    bins: ViewBins,
    names: Sequence[str] | None,
) -> str:
    count = len(worst.rows)
    said = [(heading, shown.format(figures[key])) for key, heading, shown in _FIGURES if key in figures]
    lines = []
    for place, accuracy, fields in objects[:MANY]:
        row = worst.rows[place]
        seen = (_class(row["prediction"], names), f"{float(row['loss']):.3f}", ", ".join(_said_view(row)))
        lines.append((row["object"], _class(row["label"], names), f"{accuracy:.1%}", fields, *seen))
    headings = ("object", "class", "accuracy", "fields", "worst view seen as", "loss", "viewpoint")
    note = f"{MANY} of {count} objects, those of the lowest accuracy. " if count > MANY else ""
    settings = {key: value for key, value in fresh.about["attack"].items() if value is not None}
    parts = [
        f"# Viewpoints that {name} found",
        f"{count:,} objects, {fresh.about['samples']} fresh views of each from the distribution found for it.",
        rows(("", "value"), said, 1),
        "## Objects",
        f"{note}Fields are those of 30 x 15 degrees that the fresh views fall into. γ, θ and φ are tilt, azimuth and angle "  # noqa: RUF001
        "from the pole, r distance, x and y shifts of the camera. Every view is in `views.csv`.",
        rows(headings, lines),
        "## Worst views\n\n![Worst views](images/worst_views.png)",
        "## On the view sphere\n\n![View sphere](images/view_sphere.png)",
        f"{describe_bins(bins)} Points are means of components, sized by weight, and curves their one-sigma ellipses. "
        f"A cross marks fields with fewer than {FEW} views.",
        "## Setting",
        f"```json\n{json.dumps({'attack': settings, 'space': fresh.about['space']}, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"
