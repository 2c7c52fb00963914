"""Files that are there whole or not at all, and sums over files and tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_META, _SUMS = "robust_pl", "sums"
_BLOCK = 1 << 20
_UNFINISHED = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` in one step, once all is written.

    Whoever reads ``path`` finds all of it or what was there before, also after a crash.

    Raises:
        OSError: if there is no space or no permission; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # so that the message says where there was no space
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    with replacing(path) as file:
        file.write(content)


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in folder.rglob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a safetensors file in one step, with a sum of each tensor, so that whoever reads it finds what changed since.

    Args:
        path: of the file.
        tensors: by name; copied to the CPU.
        meta: anything that JSON can hold.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: sha256_of_tensors({name: tensor}) for name, tensor in on_cpu.items()}
    write(path, save(on_cpu, {_META: json.dumps(meta), _SUMS: json.dumps(sums)}))


def read_tensors(path: Path, leave_out: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of a file that :func:`write_tensors` wrote.

    Args:
        path: of the file.
        leave_out: do not read tensors whose name begins so.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if leave_out is None or not name.startswith(leave_out)]  # noqa: SIM118
            # Copies: a view of one column would keep the whole file mapped, and with it all images of a batch in memory.
            tensors = {name: file.get_tensor(name).clone() for name in names}
            meta, sums = (json.loads(file.metadata()[key]) for key in (_META, _SUMS))
        for name, tensor in tensors.items():
            if sha256_of_tensors({name: tensor}) != sums[name]:
                raise KeyError(f"{name} is not what was written")
        return tensors, meta
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete this one file, and the same command computes it again"
        ) from error


def sha256_of_file(path: Path) -> str:
    """Sum of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Sum over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
