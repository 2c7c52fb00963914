"""Method and data module of an evaluation, from what its store says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from ..callbacks.store.files import sha256_of_file
from ..callbacks.store.store import read_about
from ..data import ImageDataModule
from ..methods import Method
from ..nets.grouped import group_classes
from ..nets.reference import Reference, pick_average
from ..nets.weights import load_weights
from ..trust import check_classes, guarded, read_checkpoint


def rebuild(folder: Path, named: Collection[str] = (), checkpoint: Path | None = None) -> tuple[Method, ImageDataModule]:
    """The network with its weights, in eval mode on the CPU, and the data of an evaluation that ``robust-pl test`` made.

    Args:
        folder: of the evaluation.
        named: class paths outside of robust_pl, torch, timm and lightning that it may import.
        checkpoint: where the checkpoint is now; None looks where it was, and in the run's folder.

    Raises:
        FileNotFoundError: if the checkpoint or the data are not where they were.
        ValueError: if the store was not made by the command line, or names classes that it may not import.
    """
    about = read_about(folder)
    request = about["request"]
    if "model" not in request:
        raise ValueError(
            f"{folder} was not made by robust-pl test: call robust_pl.evaluation.audit.audit(folder, model, read) from Python"
        )
    config = {"model": request["model"], "data": request["data"]}
    check_classes(config, folder / "store.json", named)
    with guarded(named):
        # Built by code, as far as the method can tell: nothing here is ever saved.
        method, data = _instantiate(config)
    if request["checkpoint"] is not None:
        path = _find(folder, about.get("notes", {}).get("checkpoint"), request["checkpoint"], checkpoint)
        content = read_checkpoint(path)
        # An evaluation of averaged weights says which.
        average = request.get("weights")
        load_weights(method, pick_average(content, Reference(path, average)) if average else content["state_dict"])
    elif method.initial_weights is not None:
        load_weights(method.net, method.initial_weights)
    data.prepare_data()
    data.setup("test")
    if data.class_groups is not None:
        group_classes(method, data.class_groups)
    return method.eval(), data


def _instantiate(config: Mapping[str, Any]) -> tuple[Method, ImageDataModule]:
    from ..cli_parser import link_data_to_net

    parser = LightningArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_lightning_class_args(Method, "model", subclass_mode=True)
    parser.add_lightning_class_args(ImageDataModule, "data", subclass_mode=True)
    link_data_to_net(parser)
    built = parser.instantiate_classes(parser.parse_object(dict(config)))
    return built.model, built.data


def _find(folder: Path, noted: str | None, wanted: str, given: Path | None) -> Path:
    """The checkpoint, by its sum: where it was, or anywhere in the run's folder."""
    run = folder.resolve().parent
    candidates = [run / noted] if noted else []
    candidates = [given] if given else candidates + sorted(run.rglob("*.ckpt"))
    for path in candidates:
        if path.is_file() and sha256_of_file(path) == wanted:
            return path
    raise FileNotFoundError(
        f"no checkpoint with the SHA-256 {wanted[:12]}... at {given or f'{noted} or in {run}'}: put it back, or say with "
        "--ckpt_path where it is; the evaluation was made from it"
    )


def dtype_of(folder: Path) -> torch.dtype:
    """What the network's weights and images were turned into."""
    precision = str(read_about(folder)["request"].get("trainer", {}).get("precision"))
    known = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64": torch.float64, "64-true": torch.float64}
    return known.get(precision, torch.float32)


def autocast_of(folder: Path, device: str) -> AbstractContextManager[Any]:
    """What surrounded the network during an evaluation."""
    precision = str(read_about(folder)["request"].get("trainer", {}).get("precision"))
    if precision.endswith("-mixed"):
        return torch.autocast(torch.device(device).type, torch.bfloat16 if precision.startswith("bf16") else torch.float16)
    return nullcontext()
