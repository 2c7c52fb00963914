"""Outcomes of single samples, on disk."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from torch import Tensor


class PredictionFiles:
    """``predictions.csv``, one row a sample in the order of the data set, and adversarial images if asked for.

    Every process appends to a file of its own, batch by batch; :func:`merge` makes one of them.

    Args:
        folder: where the files go; made if missing.
        rank: this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "predictions.csv").exists():
            raise ValueError(f"{folder}/predictions.csv exists and is not written over: choose another --evaluation.output_dir")
        self._file = (folder / f"predictions-{rank}.csv").open("w", newline="")
        self._writer = csv.writer(self._file)
        self._header: list[str] = []

    def add(self, columns: dict[str, Tensor]) -> None:
        """Append a batch: name -> one number a sample, (B,)."""
        if not self._header:
            self._header = list(columns)
            self._writer.writerow(self._header)
        self._writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))

    def add_images(self, attack: str, index: Tensor, x_adv: Tensor) -> None:
        """Write the batch as ``adversarial/<attack>/<first index>.npz`` with float32 ``x_adv`` (B, C, H, W) and ``index``.

        Not as pictures: eight bits a pixel would move every perturbation.
        """
        folder = self.folder / "adversarial" / attack
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{int(index.min()):08d}.npz"
        np.savez_compressed(path, x_adv=x_adv.float().cpu().numpy(), index=index.cpu().numpy())

    def close(self) -> None:
        """Finish this process's file."""
        self._file.close()


def merge(folder: Path, processes: int) -> Path:
    """Make one table, sorted by index, of those that the processes wrote."""
    parts = [folder / f"predictions-{rank}.csv" for rank in range(processes)]
    header: list[str] = []
    rows: list[list[str]] = []
    for part in parts:
        with part.open(newline="") as file:
            lines = list(csv.reader(file))
        if lines:  # a process without a batch has no header
            header, rows = lines[0], rows + lines[1:]
    rows.sort(key=lambda row: int(row[0]))
    merged = folder / "predictions.csv"
    with merged.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    for part in parts:
        part.unlink()
    return merged
