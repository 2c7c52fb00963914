"""The report of a finished evaluation, from its store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ..callbacks.gates import called_routed_nets
from ..callbacks.store.files import read_tensors, write_json
from ..callbacks.store.store import ABOUT, FIGURES, IMAGES, Store, read_about, seal
from ..data import ImageDataModule
from ..functional.ratio import Ratio
from ..nets.grouped import grouped
from ..report import Curve, Table, worst_images, worst_samples, write_report
from .masking import masking_flags
from .masking.flag import Flag, as_json, as_table

FLAGS = "flags.json"
_WORST = 8
_AUTOATTACK = "AutoAttack"


def report_test(
    folder: Path,
    model: nn.Module,
    data: ImageDataModule,
    samples: int | None,
    device: torch.device,
    hardware: str,
    loggers: Iterable[Any] = (),
) -> Path:
    """Check for gradient masking, print what was raised, and write the report.

    Args:
        folder: of a finished evaluation.
        model: that was evaluated, on ``device``.
        data: its data.
        samples: for the checks, see :func:`write_flags`.
        device: where the network runs.
        hardware: that, in words.
        loggers: see :func:`report`.
    """
    with grouped(model, data.class_groups):
        flags = write_flags(folder, model, data, samples, device)
    raised = [flag for flag in flags if flag.raised]
    if flags:
        print(f"Checks for gradient masking: {len(raised)} of {len(flags)} raised")
    if raised:
        Console().print(as_table(raised))
    return report(folder, data, hardware, loggers)


def write_flags(folder: Path, model: nn.Module, data: ImageDataModule, samples: int | None, device: torch.device) -> list[Flag]:
    """Checks for gradient masking on the first test samples, kept as ``flags.json``; read from there if they are known.

    Args:
        folder: of the evaluation; norm and radius are those of its AutoAttack, else of its first attack with a radius.
        model: that was evaluated.
        data: its data.
        samples: how many; None takes those that are known, else 100 where AutoAttack was run or the network is a dynamic one,
            else none.
        device: where the network runs.
    """
    about = read_about(folder)
    threats = {name: threat for name, threat in about["facts"]["threats"].items() if _has_radius(threat)}
    threats = {name: threat for name, threat in threats.items() if threat["norm"] != "l1"}  # for which there are no checks
    chosen = [name for name in _autoattacks(about) if name in threats] or list(threats)
    known = _known_flags(folder)
    if samples is None:
        samples = known.get("samples", 100 if _autoattacks(about) or _is_dynamic(model, data, device) else 0)
    if not samples or not chosen:
        (folder / FLAGS).unlink(missing_ok=True)  # of another --report.flags
        return []
    samples = min(samples, len(data.test_set))
    if known.get("samples") == samples:
        return [Flag(**flag) for flag in known["flags"]]
    threat = threats[chosen[0]]
    x, y = data.test_set.read(torch.arange(samples), None)
    flags = masking_flags(model, x.to(device), y.to(device), eps=Ratio(threat["eps"]), norm=threat["norm"])
    write_json(folder / FLAGS, {"samples": samples, "flags": as_json(flags)})
    return flags


def _is_dynamic(model: nn.Module, data: ImageDataModule, device: torch.device) -> bool:
    x, _ = data.test_set.read(torch.arange(min(2, len(data.test_set))), None)
    return bool(called_routed_nets(model, x.to(device)))


def _known_flags(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FLAGS).read_text()) if (folder / FLAGS).is_file() else {}


def report(folder: Path, data: ImageDataModule, hardware: str, loggers: Iterable[Any] = ()) -> Path:
    """Write ``report.md``, its pictures and ``robustbench.json`` beside the table, and seal the evaluation again.

    Args:
        folder: of a finished evaluation.
        data: its data, for the clean images in the pictures.
        hardware: what it ran on, in words.
        loggers: that get tables and pictures, too.
    """
    store = Store(folder, {}, writer=False)
    table = Table(_columns(store), _meta(folder, hardware) | {"class_names": data.class_names})
    net = (read_about(folder)["request"].get("model", {}).get("init_args") or {}).get("net") or {}
    known = {"name": _name(folder), "architecture": str(net.get("class_path", "")).rpartition(".")[2]}
    curves, grids = _curves(table), _grids(store, table, data)
    path = write_report(table, folder, curves=curves, grids=grids, loggers=loggers, known=known)
    _note(folder, hardware=hardware, class_names=None if data.class_names is None else list(data.class_names))
    seal(folder)
    return path


def _note(folder: Path, **notes: Any) -> None:
    """What later reports, which have neither data nor device, say of where the figures come from."""
    about = read_about(folder)
    about["notes"] = {**about.get("notes", {}), **notes}
    write_json(folder / ABOUT, about)


def _has_radius(threat: Mapping[str, Any]) -> bool:
    return threat["eps"] is not None and 0 < Ratio(threat["eps"]) < float("inf")


def _autoattacks(about: Mapping[str, Any]) -> list[str]:
    attacks = about["request"].get("attacks") or {}
    return [name for name, attack in attacks.items() if str(attack.get("class_path", "")).endswith(f".{_AUTOATTACK}")]


def _name(folder: Path) -> str:
    return str(read_about(folder).get("notes", {}).get("name", folder.parent.name))


def _columns(store: Store) -> dict[str, Tensor]:
    """All columns, without images: some ten numbers a sample and attack."""
    batches = list(store.columns())
    return {name: torch.cat([columns[name] for columns, _ in batches]) for name in batches[0][1]["columns"]}


def _meta(folder: Path, hardware: str) -> dict[str, Any]:
    about = read_about(folder)
    request, threats = about["request"], about["facts"]["threats"]
    figures = json.loads((folder / FIGURES).read_text())
    attacks = {}
    for name, threat in threats.items():
        asked = (request.get("attacks") or {}).get(name, {})
        settings = {k: v for k, v in (asked.get("init_args") or {}).items() if v is not None}
        seconds = round(figures.get(f"seconds_{name}", 0.0), 2)
        attacks[name] = {"class": asked.get("class_path", ""), **settings, **threat, "seconds": seconds}
    return {
        "model": _name(folder),
        "dataset": _dataset(request.get("data") or {}),
        "attacks": attacks,
        "flags": _known_flags(folder).get("flags"),
        "cost": about.get("notes", {}).get("cost"),
        "versions": about.get("notes", {}).get("versions", {}),
        "hardware": hardware,
        "config": yaml.safe_dump(request, sort_keys=False),
    }


def _dataset(config: Mapping[str, Any]) -> str:
    """Name of the data set, also where another data module wraps it."""
    inner = (config.get("init_args") or {}).get("data")
    if isinstance(inner, Mapping):
        return _dataset(inner)
    return str(config.get("class_path", "")).rpartition(".")[2].removesuffix("DataModule")


def _curves(table: Table) -> list[Curve]:
    """One curve for each group of attacks that differ in nothing but the radius."""
    groups: dict[str, list[str]] = {}
    for name in table.attacks:
        about = {k: v for k, v in table.about(name).items() if k not in ("eps", "seconds")}
        if _has_radius({"eps": table.about(name).get("eps")}):
            groups.setdefault(json.dumps(about, sort_keys=True, default=str), []).append(name)
    curves = []
    for names in groups.values():
        if len(names) < 2:
            continue
        radii = [0.0, *(float(Ratio(table.about(name)["eps"])) for name in names)]
        right = torch.stack([torch.as_tensor(table.right(name)) for name in (None, *names)], 1).numpy()
        about = table.about(names[0])
        if len(set(radii)) == len(radii):
            curves.append(Curve.of(str(about.get("class", "")).rpartition(".")[2], about["norm"], radii, right))
    # A plot has one axis of radii.
    return [curve for curve in curves if curve.norm == curves[0].norm]


def _grids(store: Store, table: Table, data: ImageDataModule) -> dict[str, Image.Image]:
    """For each attack whose images were kept, the samples that it fooled with the least."""
    firsts = torch.tensor(store.finished())
    pictures = {}
    for attack in table.attacks:
        rows = worst_samples(table, attack, _WORST)
        if not len(rows) or f"{IMAGES}{attack}" not in read_tensors(store.shard(int(firsts[0])))[0]:
            continue
        index = torch.as_tensor(table.columns["index"][rows])
        x, _ = data.test_set.read(index, None)
        x_adv = torch.stack([_stored(store, firsts, attack, int(i)) for i in index])
        pictures[f"Worst images of {attack}"] = worst_images(table, attack, rows, x, x_adv, data.class_names)
    return pictures


def _stored(store: Store, firsts: Tensor, attack: str, position: int) -> Tensor:
    """The adversarial image of one sample."""
    shard = int(firsts[torch.searchsorted(firsts, position, right=True) - 1])
    tensors, _ = read_tensors(store.shard(shard))
    return tensors[IMAGES + attack][(tensors["index"] == position).nonzero()[0, 0]]
