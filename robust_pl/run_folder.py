"""One run, one folder.

``<output_dir>/<name>/`` holds ``config.yaml``, ``run.json`` (versions, seed, the run's wandb id, what it was trained on),
``checkpoints/best.ckpt`` and ``last.ckpt``, ``metrics/version_*/metrics.csv``, ``images/``, ``wandb/`` and, for each test or
predict, a folder with the outcome of every sample; that of averaged weights lies beside it, such as ``test-ema/``.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .callbacks.store.files import write_json
from .callbacks.store.store import ABOUT, read_about

_MARK = "run.json"
_FOLDER_VARIABLE = "ROBUST_PL_RUN_FOLDER"


def versions() -> dict[str, str]:
    """Versions of Python and of what a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("robust_pl", "torch", "lightning", "torchmetrics", "jsonargparse", "omegaconf", "wandb", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def hardware(device: torch.device) -> str:
    """What something ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads of torch"


class RunFolder:
    """Where a run keeps what it makes.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_checkpoint(cls, checkpoint: str | None) -> RunFolder | None:
        """The run that a checkpoint lies in, if it lies in one."""
        for parent in Path(checkpoint).resolve().parents if checkpoint else ():
            if (parent / _MARK).is_file():
                return cls(parent)
        return None

    @classmethod
    def of_evaluation(cls, output_dir: str, name: str, command: str, request: Mapping[str, Any]) -> RunFolder | None:
        """The run ``name``, ``name-2``, ... in which the same evaluation was begun, if there is one."""
        for path in _numbered(Path(output_dir), name):
            if cls(path).begun(command, request) is not None:
                return cls(path.resolve())
        return None

    @classmethod
    def create(cls, output_dir: str, name: str, settings: Mapping[str, Any]) -> RunFolder:
        """A new folder ``name``, ``name-2``, ...: what is there is never written over.

        Processes that this one starts find the same folder in their environment; those that a cluster starts find it by the
        job's number, and the first process makes it.

        Raises:
            OSError: if nothing can be written there.
        """
        inherited = os.environ.get(_FOLDER_VARIABLE)
        if inherited and "LOCAL_RANK" in os.environ:
            return cls(Path(inherited))
        root = Path(output_dir)
        if job := _job():
            path = root / f"{name}-{job}"
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = _fresh(root, name)
        run = cls(path.resolve())
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0 and not (run.path / _MARK).exists():
            record = {**settings, "wandb_id": secrets.token_hex(4), "versions": versions()}
            (run.path / _MARK).write_text(json.dumps(record, indent=2) + "\n")
        os.environ[_FOLDER_VARIABLE] = str(run.path)
        return run

    @staticmethod
    def forget() -> None:
        """Let the next run of this process have a folder of its own."""
        for variable in [name for name in os.environ if name.startswith(_FOLDER_VARIABLE)]:
            del os.environ[variable]

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        mark = self.path / _MARK
        return json.loads(mark.read_text()) if mark.is_file() else {}

    def note(self, **facts: Any) -> None:
        """Add to what ``run.json`` says."""
        write_json(self.path / _MARK, {**self.record(), **facts})

    def begun(self, command: str, request: Mapping[str, Any]) -> Path | None:
        """The folder of this run in which the same evaluation was begun, if there is one."""
        wanted = json.loads(json.dumps(request))  # as it will have been written
        for path in _numbered(self.path, command):
            with suppress(ValueError):  # damaged, or of another version: not this one
                if (path / ABOUT).is_file() and read_about(path).get("request") == wanted:
                    return path
        return None

    def evaluation(self, command: str, request: Mapping[str, Any]) -> Path:
        """Folder of an evaluation: the one in which the same was begun, else a new ``command``, ``command-2``, ..."""
        variable = f"{_FOLDER_VARIABLE}_{command.upper()}"
        if variable not in os.environ or "LOCAL_RANK" not in os.environ:
            os.environ[variable] = str(self.begun(command, request) or _fresh(self.path, command))
        return Path(os.environ[variable])


def _job() -> str | None:
    """What all processes that a cluster or torchrun started for one run, and no other run, have in common."""
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) < 2:
        return None
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("SLURM_JOB_ID") or (torchrun if torchrun != "none" else os.environ.get("MASTER_PORT"))


def _numbered(root: Path, name: str) -> list[Path]:
    """``name``, ``name-2``, ... as far as they are there."""
    paths = [path for path in root.glob(f"{name}*") if path.is_dir() and path.name.removeprefix(name).strip("-").isdigit()]
    return [path for path in (root / name,) if path.is_dir()] + sorted(paths, key=lambda path: (len(path.name), path.name))


def _fresh(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
