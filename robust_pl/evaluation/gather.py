"""What runs measured, read from their folders."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..callbacks.monitors.compute import COST_FILE
from ..callbacks.store.files import sha256_of_file
from ..callbacks.store.store import ABOUT, FIGURES, SUMS, TABLE, read_about
from ..report.cost import cost_figures, cost_note
from ..report.html.run import Run, Tested, name_of_data, settings_of
from ..report.table import Table
from .gather_parts import read_analyses, read_training, read_views

MARK, FLAGS = "run.json", "flags.json"
# What moves the training data or how they are loaded, and does not tell one test set from another.
_INCIDENTAL = (
    "seed",
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "data_dir",
    "val_size",
    "val_split",
    "augment",
    "drop_last",
)


def gather(folders: Sequence[Path]) -> list[Run]:
    """Read runs. What is damaged or missing inside of one is named among its ``gaps``.

    Args:
        folders: of runs, see :mod:`robust_pl.run_folder`.

    Raises:
        FileNotFoundError: if one is no folder.
        ValueError: if one is no run, or is named twice.
    """
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: name a run, such as runs/quickstart")
        if not (folder / MARK).is_file():
            inside = next((parent for parent in folder.resolve().parents if (parent / MARK).is_file()), None)
            hint = f"it lies in the run {inside}, name that" if inside else "name a run, such as runs/quickstart"
            raise ValueError(f"{folder} is no run, as it holds no {MARK}: {hint}")
        if folder.resolve() in seen:
            raise ValueError(f"{folder} is named twice: name each run once")
        seen.add(folder.resolve())
    runs = [_read(folder.resolve(), label) for folder, label in zip(folders, _labels(folders), strict=True)]
    return _with_distinct_data(runs)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many of the folders above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read(folder: Path, label: str) -> Run:
    gaps: list[str] = []
    about = _json(folder / MARK, gaps) or {}
    tests = []
    for path in sorted(folder.glob(f"*/{ABOUT}"), key=lambda path: (len(path.parent.name), path.parent.name)):
        tested = _tested(path.parent, gaps)
        tests += [] if tested is None else [tested]
    if not tests:
        gaps.append("no finished evaluation: robust-pl test --ckpt_path RUN/checkpoints/best.ckpt makes one")
    configs = {path.name: path.read_text(errors="replace") for path in sorted(folder.glob("config*.yaml"))}
    try:
        config = yaml.safe_load(configs.get("config.yaml", "")) or {}
    except yaml.YAMLError:
        config = {}
        gaps.append("config.yaml is damaged: its text is shown as it is")
    notes = [tested.table.meta for tested in tests]
    config = config if config and isinstance(config, dict) else next((note["config"] for note in notes), {})
    cost = _cost(folder, gaps) or next((note["cost"] for note in notes if _is_cost(note.get("cost"))), None)
    data = name_of_data(config.get("data")) or (tests[0].data if tests else "")
    return Run(
        label,
        config,
        configs,
        about.get("seed"),
        about.get("versions") or {},
        str(about.get("hardware") or next((note["hardware"] for note in notes if note.get("hardware")), "")),
        tests,
        read_analyses(folder, {tested.folder: tested.data for tested in tests}, data, gaps),
        read_views(folder, gaps),
        cost,
        read_training(folder, gaps),
        gaps,
        "config.yaml" in configs,
    )


def _cost(folder: Path, gaps: list[str]) -> dict[str, Any] | None:
    if not (folder / COST_FILE).is_file():
        return None
    cost = _json(folder / COST_FILE, gaps)
    if cost is None or _is_cost(cost):
        return cost
    gaps.append(f"{COST_FILE} does not say what a training cost: it is left out")
    return None


def _is_cost(cost: Any) -> bool:
    try:
        return bool(cost) and all(np.isfinite(value) for value in cost_figures(cost).values()) and bool(cost_note(cost))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _tested(folder: Path, gaps: list[str]) -> Tested | None:
    """An evaluation; None, and why, where it is not finished or not what was written."""
    try:
        about = read_about(folder)
        if not (folder / SUMS).is_file():
            gaps.append(f"{folder.name} is not finished: the same command goes on with it")
            return None
        _check_sums(folder)
        request, facts = about.get("request") or {}, about.get("facts") or {}
        meta = _meta(about, json.loads((folder / FIGURES).read_text()))
        if (folder / FLAGS).is_file():
            meta["flags"] = json.loads((folder / FLAGS).read_text())["flags"]
        table = Table(_columns(folder / TABLE), meta)
        identity = f"{facts.get('first_16', '')} {facts.get('samples', len(table))}"
        data = name_of_data(request.get("data")) or "test set"
        network = str(request.get("checkpoint") or facts.get("weights", ""))
        checkpoint = Path(str((about.get("notes") or {}).get("checkpoint", ""))).name
        return Tested(folder.name, data, identity, str(request.get("weights") or ""), network, checkpoint, table)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        gaps.append(f"{folder.name} is left out: {error}")
        return None


def _check_sums(folder: Path) -> None:
    """Those of the files that a report reads; ``robust-pl audit`` looks at all."""
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in (folder / SUMS).read_text().splitlines())}
    for name in (ABOUT, TABLE, FIGURES):
        if name not in sums or not (folder / name).is_file() or sha256_of_file(folder / name) != sums[name]:
            raise ValueError(f"{name} is not what was written, its sum differs: robust-pl audit tells more")


def _columns(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        names = next(csv.reader(file))
        numbers = np.loadtxt(file, delimiter=",", ndmin=2)
    whole = ("index", "label", "prediction")
    return {
        name: column.astype(np.int64) if name.startswith(whole) else column
        for name, column in zip(names, numbers.T, strict=True)
    }


def _meta(about: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    request, notes = about.get("request") or {}, about.get("notes") or {}
    attacks = {}
    for name, threat in (about.get("facts") or {}).get("threats", {}).items():
        asked = (request.get("attacks") or {}).get(name, {})
        settings = {key: value for key, value in settings_of(asked).items() if value is not None}
        seconds = figures.get(f"seconds_{name}")
        attacks[name] = {"class": asked.get("class_path", ""), **settings, **threat, "seconds": seconds}
    kept = {key: notes[key] for key in ("class_names", "hardware", "versions", "cost") if notes.get(key)}
    return {"attacks": attacks, "config": request, **kept}


def _json(path: Path, gaps: list[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        raise ValueError("it holds no map")
    except (ValueError, OSError) as error:
        gaps.append(f"{path.name} is damaged ({error}): what it says is left out")
        return None


def _with_distinct_data(runs: list[Run]) -> list[Run]:
    """Test sets of one name that are not the same get names of their own: by what differs in their settings, or their size."""
    sets: dict[str, dict[str, Tested]] = {}
    for run in runs:
        for tested in run.tests:
            sets.setdefault(tested.data, {}).setdefault(tested.identity, tested)
    named = {}
    for data, tests in sets.items():
        asked = [settings_of(test.table.meta["config"].get("data")) for test in tests.values()]
        settings = [{key: value for key, value in one.items() if key not in _INCIDENTAL} for one in asked]
        differ = [key for key in settings[0] if len({str(one.get(key)) for one in settings}) > 1]
        for number, (identity, test) in enumerate(tests.items()):
            said = ", ".join(f"{key}={settings[number].get(key)}" for key in differ) or f"{len(test.table):,} samples"
            name = data if len(tests) == 1 else f"{data} ({said})"
            taken = name in named.values()
            named[data, identity] = f"{name} #{number + 1}" if taken else name
    return [_renamed(run, named) for run in runs]


def _renamed(run: Run, named: dict[tuple[str, str], str]) -> Run:
    tests = [dataclasses.replace(test, data=named[test.data, test.identity]) for test in run.tests]
    now = {old.folder: new.data for old, new in zip(run.tests, tests, strict=True)}
    analyses = [dataclasses.replace(one, data=now.get(one.folder, one.data)) for one in run.analyses]
    return dataclasses.replace(run, tests=tests, analyses=analyses)
