"""Runs made by hand: what a training and its tests leave on disk, small, with numbers that can be worked out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from robust_pl.callbacks.store.store import seal
from robust_pl.report import Curve, HeatMap, Lines, Record, Sheet

NAMES = ["cat", "dog"]
ATTACKS = {"pgd": {"class_path": "robust_pl.callbacks.PGD", "init_args": {"eps": "8/255", "steps": 10, "seed": 0}}}
COST = {
    "samples": 100,
    "networks": {"net": {"training": {"forwards": 200, "input_backwards": 100, "weight_backwards": 100}}},
    "flops": 4e9,
    "evaluation_flops": 1e9,
    "seconds": 36.0,
    "evaluation_seconds": 4.0,
    "device": "CPU",
    "devices": 1,
    "device_hours": 0.01,
}


def make_run(folder: Path, seed: int = 0, width: int = 32, **config: Any) -> Path:
    """A trained run without evaluations."""
    folder.mkdir(parents=True)
    write(folder / "run.json", {"name": folder.name, "seed": seed, "versions": {"torch": "2.13.0"}, "hardware": "a small CPU"})
    whole = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 2},
        "model": {"class_path": "robust_pl.methods.PGDAT", "init_args": {"net": net(width)}},
        "data": {"class_path": "robust_pl.data.DigitsDataModule", "init_args": {"seed": seed}},
        "run": {"name": folder.name},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
    write(folder / "compute.json", COST)
    rows = [
        ("epoch", "step", "train/loss", "val/acc_clean"),
        (0, 4, 2.0, ""),
        (0, 4, "", 0.5),
        (1, 9, 1.0, ""),
        (1, 9, "", 0.75),
    ]
    put_rows(folder / "metrics/version_0/metrics.csv", rows)
    return folder


def net(width: int) -> dict[str, Any]:
    return {"class_path": "robust_pl.nets.SmallCNN", "init_args": {"width": width}}


def add_test(
    run: Path,
    predicted: Sequence[int],
    attacked: Mapping[str, Sequence[int]],
    *,
    folder: str = "test",
    labels: Sequence[int] = (0, 0, 0, 0, 1, 1, 1, 1),
    data: str = "DigitsDataModule",
    checkpoint: str = "best.ckpt",
    attacks: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = NAMES,
    first_16: str = "a sum",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A finished evaluation with the predictions of clean images and under each attack."""
    path = run / folder
    asked = {name: (attacks or ATTACKS).get(name, ATTACKS["pgd"]) for name in attacked}
    about = {
        "format": 2,
        "request": {
            "model": {"class_path": "robust_pl.methods.PGDAT", "init_args": {"net": net(32)}},
            "data": {"class_path": f"robust_pl.data.{data}", "init_args": dict(settings or {})},
            "attacks": asked,
            "checkpoint": f"sum of {run.name}/{checkpoint}",
        },
        "notes": {"checkpoint": f"checkpoints/{checkpoint}", "class_names": list(class_names), "hardware": "a small CPU"},
        "facts": {
            "threats": {name: {"norm": "linf", "eps": one["init_args"]["eps"]} for name, one in asked.items()},
            "samples": len(labels),
            "first_16": first_16,
        },
    }
    write(path / "store.json", about)
    write(path / "figures.json", {f"seconds_{name}": 1.5 for name in attacked})
    header = ["index", "label", "prediction", "confidence"]
    for name in attacked:
        header += [f"prediction_{name}", f"linf_{name}", f"forwards_{name}", f"backwards_{name}"]
    rows = [header]
    for i, label in enumerate(labels):
        row = [i, label, predicted[i], 0.5]
        for said in attacked.values():
            row += [said[i], 0.03, 10, 10]
        rows.append(row)
    put_rows(path / "predictions.csv", rows)
    seal(path)
    return path


def add_analyses(run: Path, title: str = "Made up", shift: float = 0.0) -> None:
    """A record of every part that there is, a robustness curve and a view sphere."""
    folder = run / "analysis/test"
    picture(folder / "seen.png")
    record = Record(
        "MadeUp",
        "madeup",
        title,
        {"mean": 0.5 + shift, "count": 3.0},
        [Sheet("sheet", ["what", "share"], [["fog", 0.25 + shift], ["snow", None]], share=True)],
        [Lines("curve", "radius", "accuracy", [0, 4, 8], {"low": [1.0, 0.5 + shift, None]}, share=True)],
        [
            HeatMap(
                "map", "severity", "corruption", [1, 2], ["fog", "snow"], [[0.1 + shift, None], [3.0, 4.0]], value_label="error"
            )
        ],
        {"seen": "seen.png"},
        {"samples": 8, "settings": {"seed": 0}, "seconds": 1.0},
        ["A sentence that readers need."],
    )
    (folder / "madeup.json").write_text(record.as_json())
    worse = Record("Corruptions", "corruptions", "Common corruptions", {"mean": 0.4 + shift, "mce": 0.8 - shift})
    (folder / "corruptions.json").write_text(worse.as_json())
    curve = Curve("robustness_curve", "linf", (0.0, 4 / 255, 8 / 255), (8, 5, 6), (8, 5, 4), 8)
    write(run / "images/robustness_curve.json", curve.as_dict())
    head = ("azimuth_from", "azimuth_to", "elevation_from", "elevation_to", "views", "right", "accuracy", "low", "high")
    sphere = [(-180, 0, -90, 0, 4, 1), (0, 180, -90, 0, 4, 2), (-180, 0, 0, 90, 0, 0), (0, 180, 0, 90, 4, 4)]
    put_rows(run / "images/view_sphere.csv", [head, *((*row, "", "", "") for row in sphere)])
    picture(run / "images/view_sphere.png")


def add_views(
    run: Path, name: str = "viewfool", predicted: Sequence[int] = (0, 1, 0, 1), worst: Sequence[int] = (1, 1)
) -> None:
    """Two objects of the classes 0 and 1, with two fresh views each."""
    head = ["file", "kind", "object", "label", "prediction", "loss", "gamma", "theta", "phi", "r", "x", "y"]
    place = (0.0, 10.0, 20.0, 4.0, 0.0, 0.0)
    rows = [["", "sample", f"o{i // 2}", i // 2, said, 0.5 + i, *place] for i, said in enumerate(predicted)]
    rows += [["", "worst", f"o{i}", i, said, 3.0, *place] for i, said in enumerate(worst)]
    folder = run / f"viewpoints/test_{name}"
    put_rows(folder / "views.csv", [head, *rows])
    write(folder / "views.json", {"attack": {"class": "ViewFool", "seed": 0}, "renders": 120})
    picture(folder / "images/worst_views.png")
    picture(folder / "images/view_sphere.png")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def put_rows(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "orange").save(path)
