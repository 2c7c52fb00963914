"""Check an evaluation from what it left on disk, image by image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks.attacks.prepare import evaluating
from ..callbacks.store.files import read_tensors, sha256_of_file
from ..callbacks.store.identity import replay, sha256_of_weights
from ..callbacks.store.store import FIGURES, LOCK, SUMS, TABLE, Store, read_about, write_table
from ..metrics.scoreboard import Scoreboard, as_metrics, by_class
from .audit_batch import Batch, Read, malformed
from .audited import Audit

_TOLERANCE = 1e-5
# Kinds of figures that came later: an evaluation stored before has none of them, which is no fault.
_LATER = ("worst_tenth_", "nsd_", "fair_", "class_acc_")


def audit(
    folder: str | Path,
    model: nn.Module,
    read: Read,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Audit:
    """Re-read everything that an evaluation stored, run the model again on every image, and compare.

    Looks at the sums of all files, the network's weights, clean pixels and labels, each adversarial image (finite, in ball
    and box), every prediction and size, every accuracy, and the table. Costs one forward pass for each stored image.

    Args:
        folder: of a finished evaluation.
        model: that was evaluated, on the device where it shall run; evaluated in eval mode and left as it was.
        read: positions (B,) of samples -> clean pixels (B, C, H, W) and labels (B,).
        autocast: what surrounded the network, if it ran in another precision than that of its weights.
        watch: is given the batches, for a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no evaluation.
        ValueError: if the evaluation is not finished.
    """
    folder = Path(folder)
    about = read_about(folder)
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} holds an evaluation that is not finished: start it again with the same command")
    found = Audit(folder)
    _check_files(found)
    facts = about.get("facts", {})
    same = facts.get("weights") == sha256_of_weights(model)
    found.check("weights", None if same else "the network's weights are not those that were evaluated")
    store = Store(folder, {}, writer=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    board: Scoreboard | None = None
    positions: list[Tensor] = []
    threats = facts.get("threats", {})
    with evaluating(model), torch.no_grad(), autocast or nullcontext():
        for first in watch(store.finished()):
            try:
                tensors, meta = read_tensors(store.shard(first))
                if problem := malformed(tensors, meta):
                    raise ValueError(f"{store.shard(first)} is none that an evaluation writes: {problem}")
            except ValueError as error:
                found.check("shards", str(error))
                continue
            found.check("shards")
            positions.append(tensors["index"])
            Batch(found, tensors, meta, threats, device).check(model, read)
            board = board or Scoreboard(list(meta["seconds"]), meta["classes"])
            replay(board, tensors, meta["seconds"], torch.device("cpu"))
    if board is None:
        found.check("shards", "there is none")
    else:
        _check_samples(found, about, torch.cat(positions))
        _check_figures(found, as_metrics(board.rows()) | by_class(board.rows()))
        _check_table(found, store)
    return found


def _check_files(found: Audit) -> None:
    """Every file against its sum."""
    listed: dict[str, str] = {}
    text = (found.folder / SUMS).read_bytes().decode(errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            found.check("files", f"line {number} of {SUMS} is not a sum and a name")
        else:
            listed[name] = digest
    if not text.endswith("\n"):
        found.check("files", f"{SUMS} does not end with a line's end: it may be cut off")
    for name, digest in listed.items():
        path = found.folder / name
        problem = None
        if not path.is_file():
            problem = f"{name} is missing"
        elif sha256_of_file(path) != digest:
            problem = f"{name} is not the file that was written: its SHA-256 differs from {SUMS}"
        found.check("files", problem)
    for path in sorted(found.folder.rglob("*")):
        name = path.relative_to(found.folder).as_posix()
        if path.is_file() and name not in (SUMS, LOCK) and name not in listed:
            found.check("files", f"{name} is not listed in {SUMS}")


def _check_samples(found: Audit, about: Mapping[str, Any], index: Tensor) -> None:
    """Each sample once, and all of the data set where all were asked for."""
    twice = len(index) - len(index.unique())
    found.check("samples", f"{twice} are there more than once" if twice else None, len(index))
    trainer = about["request"].get("trainer", {})
    limits = [limit for key, limit in trainer.items() if key.startswith("limit_") and limit is not None]
    limited = trainer.get("fast_dev_run") or any(isinstance(limit, int) or limit < 1 for limit in limits)
    asked = about.get("facts", {}).get("samples")
    if asked is not None and not limited and len(index) != asked:
        found.check("samples", f"{len(index)} are there, and the data set had {asked}")


def _check_figures(found: Audit, figures: Mapping[str, float]) -> None:
    try:
        stored = json.loads((found.folder / FIGURES).read_text())
    except (OSError, ValueError) as error:
        found.check("figures", f"{FIGURES} cannot be read: {error}")
        return
    # Several processes count the seconds of the slowest.
    skipped = ("seconds_", *(kind for kind in _LATER if not any(name.startswith(kind) for name in stored)))
    for name in sorted({*stored, *figures}):
        if name.startswith(skipped):
            continue
        here, there = figures.get(name), stored.get(name)
        same = here is not None and there is not None and abs(here - there) <= _TOLERANCE
        found.check("figures", None if same else f"{name} is {here} and {FIGURES} says {there}")


def _check_table(found: Audit, store: Store) -> None:
    """The table, written once more, equals the one that is there."""
    file = io.BytesIO()
    try:
        write_table(file, store.columns())
        same = (found.folder / TABLE).read_bytes() == file.getvalue()
    except (ValueError, KeyError, OSError) as error:  # of shards, which were complained of
        found.check("table", str(error))
        return
    found.check("table", None if same else f"{TABLE} does not say what the shards say")


def evaluations(folder: Path) -> Iterator[Path]:
    """Folders of the evaluations in a run's folder, or that folder itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = [folder] if (folder / "store.json").is_file() else sorted(p.parent for p in folder.glob("*/store.json"))
    found.sort(key=lambda path: not (path / SUMS).is_file())  # what is not finished comes last, where it stops nothing
    if not found:
        raise FileNotFoundError(f"{folder} holds no evaluation: name a run that was tested, such as runs/quickstart")
    yield from found
