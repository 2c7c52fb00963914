"""What lies beside the evaluations of a run: analyses, viewpoints, and the course of the training."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..callbacks.viewpoints.images import ABOUT as VIEWS_ABOUT
from ..callbacks.viewpoints.images import TABLE as VIEWS_TABLE
from ..functional.viewpoints import azimuth_and_elevation, camera_to_world
from ..report.curve import Curve as RobustCurve
from ..report.curve import curve_record
from ..report.html.run import Analysed, Curve, Viewed
from ..report.record import HeatMap, Record
from ..report.view_bins import ViewBins
from ..scenes.view_space import NAMES

_PNG = b"\x89PNG\r\n\x1a\n"
_LEFT_OUT = ("test", "predict", "cost/")
"""Figures that have no course: those of tests, and what a training cost until then, of which the end is shown."""


def read_analyses(folder: Path, data: Mapping[str, str], trained_on: str, gaps: list[str]) -> list[Analysed]:
    """Records under ``analysis/``, robustness curves and view spheres under ``images/``.

    Args:
        folder: of the run.
        data: folder of an evaluation -> its data set.
        trained_on: the data set of what does not say.
        gaps: told what could not be read.
    """
    found = []
    for path in sorted((folder / "analysis").rglob("*.json")):
        try:
            record = Record.read(path)
        except (ValueError, OSError) as error:
            gaps.append(f"{path.relative_to(folder)} is left out: {error}")
            continue
        place = path.parent.name
        pictures = _pictures({title: path.parent / name for title, name in record.pictures.items()}, folder, gaps)
        said = data.get(place) or str(record.about.get("data") or trained_on).removesuffix("DataModule")
        found.append(Analysed(place, said, record, pictures))
    for path in sorted((folder / "images").glob("*.json")):
        try:
            record = curve_record(path.stem, RobustCurve.from_dict(json.loads(path.read_text())))
            found.append(Analysed("", trained_on, record))
        except (ValueError, KeyError, TypeError, OSError) as error:
            gaps.append(f"{path.relative_to(folder)} holds no robustness curve: {error}")
    for path in sorted((folder / "images").glob("*_sphere.csv")):
        try:
            record = sphere_record(path)
        except (ValueError, KeyError, OSError) as error:
            gaps.append(f"{path.relative_to(folder)} holds no view sphere: {error}")
            continue
        found.append(Analysed("", trained_on, record, _pictures({record.title: path.with_suffix(".png")}, folder, gaps)))
    return found


def sphere_record(path: Path) -> Record:
    """The fields of a view sphere as the record of an analysis."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    edges = [
        sorted({float(row[f"{axis}_{end}"]) for row in rows for end in ("from", "to")}) for axis in ("azimuth", "elevation")
    ]
    shape = (len(edges[1]) - 1, len(edges[0]) - 1)
    total, right = (np.array([int(row[key]) for row in rows]).reshape(shape) for key in ("views", "right"))
    bins = ViewBins(np.array(edges[0]), np.array(edges[1]), total, right)
    names = [[f"{low:g} to {high:g}" for low, high in pairwise(ends)] for ends in edges]
    values = [[None if math.isnan(share) else share for share in row] for row in bins.accuracy[::-1].tolist()]
    title = "Accuracy by viewpoint"
    heat = HeatMap(title, "azimuth in degrees", "elevation in degrees", names[0], names[1][::-1], values, True, "accuracy")
    figures = {"mean": bins.mean, "worst_bin": float(bins.accuracy[bins.worst])}
    notes = ["The mean counts fields by their area on the sphere."]
    return Record("ViewSphere", path.stem, title, figures, maps=[heat], about={"views": int(total.sum())}, notes=notes)


def read_views(folder: Path, gaps: list[str]) -> list[Viewed]:
    """What viewpoint attacks found in tests, from the tables of their views."""
    found = []
    for path in sorted((folder / "viewpoints").glob(f"test_*/{VIEWS_TABLE}")):
        try:
            found.append(_viewed(path.parent, gaps))
        except (ValueError, KeyError, TypeError, OSError) as error:
            gaps.append(f"viewpoints/{path.parent.name} is left out: {error!r}")
    return found


def _viewed(folder: Path, gaps: list[str]) -> Viewed:
    about = json.loads((folder / VIEWS_ABOUT).read_text())
    with (folder / VIEWS_TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    fresh, worst = ([row for row in rows if row["kind"] == kind] for kind in ("sample", "worst"))
    right, standing = ([row["prediction"] == row["label"] for row in part] for part in (fresh, worst))
    views = torch.tensor([[float(row[name]) for name in NAMES] for row in fresh], dtype=torch.float64)
    azimuth, elevation = (angle.numpy() for angle in azimuth_and_elevation(camera_to_world(views)))
    objects = np.array([row["object"] for row in fresh])
    fields = []
    for name in dict.fromkeys(objects.tolist()):
        own = objects == name
        fields.append(ViewBins.count(azimuth[own], elevation[own], own[own]).covered)
    figures = {"view_loss": float(np.mean([float(row["loss"]) for row in fresh])), "coverage": float(np.mean(fields))}
    figures["renders"] = float(about["renders"])
    pictures = {"Worst views": folder / "images/worst_views.png", "On the view sphere": folder / "images/view_sphere.png"}
    return Viewed(
        folder.name.removeprefix("test_"),
        len(fresh),
        sum(right),
        len(worst),
        sum(standing),
        figures,
        about.get("attack") or {},
        _pictures(pictures, folder.parent.parent, gaps),
    )


def read_training(folder: Path, gaps: list[str]) -> dict[str, Curve]:
    """Courses of all figures in ``metrics/version_*/metrics.csv``; where a resumed run measured once more, the later counts."""
    values: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for path in sorted((folder / "metrics").glob("version_*/metrics.csv"), key=_version):
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    step, epoch = int(float(row["step"])), row.get("epoch")
                    for name, value in row.items():
                        if value and name not in ("step", "epoch") and not name.startswith(_LEFT_OUT):
                            values[name][step] = (float(epoch) if epoch else math.nan, float(value))
        except (ValueError, KeyError, TypeError, OSError) as error:
            gaps.append(f"{path.relative_to(folder)} is damaged ({error!r}): what follows there is left out")
    courses = {}
    for name, course in sorted(values.items()):
        steps = sorted(step for step in course if math.isfinite(course[step][1]))
        epochs = [course[step][0] for step in steps]
        once = all(map(math.isfinite, epochs)) and len(set(epochs)) == len(epochs)
        x = epochs if once else [float(step) for step in steps]
        if x:
            courses[name] = Curve("epoch" if once else "step", x, [course[step][1] for step in steps])
    return courses


def _version(path: Path) -> int:
    number = re.search(r"\d+", path.parent.name)
    return int(number[0]) if number else 0


def _pictures(paths: Mapping[str, Path], run: Path, gaps: list[str]) -> dict[str, bytes]:
    """Those that are there. A record may not take files from outside of its run."""
    found = {}
    for title, path in paths.items():
        inside = path.resolve().is_relative_to(run.resolve()) and path.is_file()
        content = path.read_bytes() if inside else b""
        if content.startswith(_PNG):
            found[title] = content
        else:
            gaps.append(f"the picture {title!r} is left out: {path.name} is no PNG in the run")
    return found
