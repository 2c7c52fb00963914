"""What an analysis has seen, and how it survives a kill: a file for each batch, beside the store, until the test is over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ...data.hashing import seed_from
from ..evaluation import RobustEvaluation
from ..store.files import read_tensors, write_tensors

_KEPT, _SUMS = "kept/", "sums/"


@dataclass
class Seen:
    """What was seen of one batch or of several.

    Args:
        kept: name -> what was kept of the samples of each batch, (B, ...), on the CPU.
        sums: name -> sum over all samples.
        forwards: passes that were spent, summed over samples.
        seconds: time that was spent.
    """

    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    forwards: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[Seen]) -> Seen:
        """All of them together."""
        seen = cls()
        for part in parts:
            seen.include(part)
        return seen

    def on_cpu(self) -> Seen:
        """The same with float64 sums on the CPU, for which a device is waited for."""
        return Seen(self.kept, {key: value.cpu().double() for key, value in self.sums.items()}, self.forwards, self.seconds)

    def include(self, other: Seen) -> None:
        """Add what another one has seen; sums on the same device."""
        for key, values in other.kept.items():
            self.kept.setdefault(key, []).extend(values)
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.forwards += other.forwards
        self.seconds += other.seconds


class SeenFiles:
    """What one analysis saw of each batch, in files named by the position of the batch's first sample.

    Args:
        store: folder of the test's store, which is about one network and one data set, and removes the files when finished.
        name: of the analysis.
        settings: all that determines what it sees, for JSON; files of other settings are not found.
    """

    @classmethod
    def of_test(cls, trainer: Trainer, name: str, settings: dict[str, Any]) -> SeenFiles | None:
        """Those of a test that can go on; None without a store, or where a user's own loader shows all batches again."""
        store, data = store_of_test(trainer), trainer.datamodule
        if store is None or not hasattr(data, "leave_out"):
            return None
        return cls(store, name, {"settings": settings, "batches": data.eval_batch_size})

    def __init__(self, store: Path, name: str, settings: dict[str, Any]) -> None:
        settings_as_text = json.dumps(settings, sort_keys=True, default=str)
        self.folder = store / "parts" / "analysis" / f"{name}-{seed_from(settings_as_text):016x}"

    def found(self) -> list[int]:
        """Positions of the first samples of the batches that were seen, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def read(self, first: int) -> Seen:
        """What was seen of a batch.

        Raises:
            ValueError: if the file is damaged.
        """
        tensors, meta = read_tensors(self._path(first))
        kept = {key.removeprefix(_KEPT): [value] for key, value in tensors.items() if key.startswith(_KEPT)}
        sums = {key.removeprefix(_SUMS): value for key, value in tensors.items() if key.startswith(_SUMS)}
        return Seen(kept, sums, meta["forwards"], meta["seconds"])

    def write(self, first: int, seen: Seen) -> None:
        """Keep what was seen of one batch."""
        tensors = {_KEPT + key: torch.cat(values) for key, values in seen.kept.items()}
        tensors |= {_SUMS + key: value for key, value in seen.sums.items()}
        write_tensors(self._path(first), tensors, {"forwards": seen.forwards, "seconds": seen.seconds})

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"


def store_of_test(trainer: Trainer) -> Path | None:
    """Folder of the store of what happens to the raw weights, if there is one."""
    return next((c.tracks[0].folder for c in trainer.callbacks if isinstance(c, RobustEvaluation)), None)
