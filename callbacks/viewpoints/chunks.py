"""An attack on many objects on disk, in chunks, which survives being killed at any moment.

::

    attack.json                       what was asked: settings, objects, sums of weights
    chunks/00000.safetensors          what was found for the objects from the first on, whose chunk is finished
    parts/00000.safetensors           where the search stands in a chunk that is not

A chunk is named by the number of its first object. All files are written in one step, and whoever computes one again writes the
same numbers, so going on is to compute what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..store.files import read_tensors, write_json, write_tensors

ABOUT = "attack.json"
Kept = tuple[dict[str, Tensor], dict[str, Any]]


class OtherAttackError(ValueError):
    """A folder holds another attack."""


class Chunks:
    """Keeps finished chunks and the state of unfinished ones.

    Args:
        folder: where; made if missing. None keeps nothing.
        request: all that determines the result, for JSON.

    Raises:
        OtherAttackError: if the folder holds another attack, or files that are none.
    """

    def __init__(self, folder: Path | None, request: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        if not _fits(folder, request):
            raise OtherAttackError(
                f"{folder} holds another attack or other files ({_difference(folder, request)}): choose another folder, and "
                "nothing there is touched"
            )
        if not (folder / ABOUT).exists():
            write_json(folder / ABOUT, request)

    def finished(self, first: int) -> Kept | None:
        """What :meth:`finish` was given for a chunk."""
        return self._read("chunks", first)

    def finish(self, first: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep what was found for a chunk; its state is no longer needed."""
        if self.folder is not None:
            write_tensors(self._path("chunks", first), tensors, meta)
            self._path("parts", first).unlink(missing_ok=True)

    def recall(self, first: int) -> Kept | None:
        """What :meth:`remember` was last given for a chunk."""
        return self._read("parts", first)

    def remember(self, first: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep where the search in a chunk stands."""
        if self.folder is not None:
            write_tensors(self._path("parts", first), tensors, meta)

    def _read(self, kind: str, first: int) -> Kept | None:
        if self.folder is None or not self._path(kind, first).exists():
            return None
        return read_tensors(self._path(kind, first))

    def _path(self, kind: str, first: int) -> Path:
        return self.folder / kind / f"{first:05d}.safetensors"


def _fits(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether an attack may begin or go on in a folder: it is new, empty, or holds the same."""
    # Listed before the request is looked for, which is written before all else: other processes may be about to begin here.
    foreign = folder.exists() and (not folder.is_dir() or any(not path.name.startswith(ABOUT) for path in folder.iterdir()))
    if (folder / ABOUT).is_file():
        return _asked(folder) == json.loads(json.dumps(request))
    return not foreign


def _asked(folder: Path) -> Any:
    try:
        return json.loads((folder / ABOUT).read_text())
    except ValueError:
        return None


def _difference(folder: Path, request: Mapping[str, Any]) -> str:
    there = _asked(folder) if (folder / ABOUT).is_file() else None
    if not isinstance(there, dict):
        return f"no {ABOUT} of ours"
    wanted = json.loads(json.dumps(request))
    for key in wanted:
        if there.get(key) != wanted[key]:
            return f"its {key} is {str(there.get(key))[:80]}, not {str(wanted[key])[:80]}"
    return "it says more"
