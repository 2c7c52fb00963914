"""Reading the CIFAR batches, which are pickles, without letting the file run anything."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a protocol-2 pickle; any other codec could be a decompression bomb."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not expected here")
    return codecs.latin_1_encode(text)[0]


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str = "C", *_: Any) -> np.ndarray:
    """How NumPy writes an array with protocol 5. It cannot make an array of objects."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """The names that arrays of any NumPy version refer to, mapped to objects: nothing is imported for a file."""
    reconstruct = np.empty(0).__reduce__()[0]
    return {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): _encode,
    }


class _RefusedError(ValueError):
    """The file asked for something that is not an array."""


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self.path, self.allowed = path, _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise _RefusedError(f"{self.path} asks to import {module}.{name}; refused: a data file has no need of it")
        return self.allowed[module, name]


def load_arrays(path: str | Path) -> Any:
    """Read a pickle made of dicts, lists, numbers, bytes and NumPy arrays of numbers; strings of Python 2 become bytes.

    Raises:
        ValueError: if the file asks for anything else, or is not a complete pickle.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, path).load()
        except _RefusedError:
            raise
        except Exception as error:  # whatever a damaged pickle may raise
            raise ValueError(f"{path} is damaged or not a pickle ({error}): delete it and fetch it again") from error
