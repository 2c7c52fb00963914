"""References to weights: ``PATH`` or ``PATH#AVERAGE``, where PATH is a file or the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

AVERAGES_KEY = "robust_pl_averages"
"""Where a checkpoint keeps averaged weights: name -> {"weights": {name in the state dict: tensor}, "progress": {...}}."""
_CHECKPOINTS = ("best.ckpt", "last.ckpt")


class Reference(NamedTuple):
    """Weights on disk: a file, and which average in it; None for the raw weights."""

    path: Path
    average: str | None

    def __str__(self) -> str:
        return str(self.path) if self.average is None else f"{self.path}#{self.average}"


def split(source: str | os.PathLike[str]) -> tuple[str, str | None]:
    """``PATH`` and the name behind its last ``#``, if it has one."""
    path, mark, average = os.fspath(source).rpartition("#")
    return (path, average) if mark and path and average else (os.fspath(source), None)


def resolve(source: str | os.PathLike[str]) -> Reference:
    """Find what a reference names.

    Args:
        source: a file, or the folder of a run, which stands for its ``checkpoints/best.ckpt``, else ``last.ckpt``. A relative
            path is tried as it is, then under the folder in the environment variable ``ROBUST_PL_DATA``. ``#ema`` at its end
            picks that average in the checkpoint.

    Raises:
        FileNotFoundError: if there is no such file, or the folder holds no checkpoint.
    """
    if Path(source).expanduser().is_file():  # a file may have a # in its name
        return Reference(Path(source).expanduser(), None)
    path, average = split(source)
    return Reference(find_file(path), average)


def places(path: str | os.PathLike[str]) -> list[Path]:
    """Where a path is looked for."""
    found = [Path(path).expanduser()]
    data = os.environ.get("ROBUST_PL_DATA")
    if data and not found[0].is_absolute():
        found.append(Path(data).expanduser() / path)
    return found


def find_file(path: str | os.PathLike[str]) -> Path:
    """Return an existing file: ``path``, or the checkpoint of the run in this folder, as given, else under ``ROBUST_PL_DATA``.

    Raises:
        FileNotFoundError: if there is none.
    """
    candidates = places(path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if candidate.is_dir():
            return _checkpoint_of(candidate)
    data = os.environ.get("ROBUST_PL_DATA")
    looked = " or ".join(str(candidate) for candidate in candidates)
    remedy = "" if candidates[0].is_absolute() else "; relative paths are also tried under ROBUST_PL_DATA"
    remedy += ", which is not set" if remedy and not data else ""
    raise FileNotFoundError(f"no file of weights at {looked}: check the path{remedy}")


def pick_average(checkpoint: Any, reference: Reference) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint with the averaged weights of ``reference`` in the places of the raw ones.

    Raises:
        ValueError: if the checkpoint lacks that average.
    """
    averages = checkpoint.get(AVERAGES_KEY) if isinstance(checkpoint, Mapping) else None
    found = averages.get(reference.average) if isinstance(averages, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        there = ", ".join(f"#{name}" for name in averages or ()) or "none"
        raise ValueError(
            f"{reference.path} holds no average {reference.average!r} (there: {there}): leave out #{reference.average} for the "
            "raw weights, or train with the callback that averages, such as EMA"
        )
    if not found.get("weights"):
        raise ValueError(
            f"the average {reference.average!r} in {reference.path} has not begun: leave out #{reference.average} for the raw "
            "weights, or take a later checkpoint"
        )
    return {**checkpoint["state_dict"], **found["weights"]}


def _checkpoint_of(run: Path) -> Path:
    for name in _CHECKPOINTS:
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise FileNotFoundError(f"{run} holds no checkpoints/best.ckpt or last.ckpt: name the folder of a run that was fitted")
