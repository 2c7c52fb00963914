"""Compare the CPU time of two pieces of code on a machine that is not idle: interleaved pairs, median ratios."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

Side = Literal["ours", "lean"]


@dataclass
class Pairs:
    """CPU seconds of both sides, pair by pair; pair 0 is the warm-up and not counted.

    CPU time is that of all threads of this process (``time.process_time``), so that a busy machine disturbs it less
    than wall time. Caches are still shared: hence a ratio is taken only between neighbours, and the order alternates.

    Args:
        what: what is measured, a few words.
        count: number of pairs after the warm-up.
    """

    what: str
    count: int
    ours: list[float] = field(default_factory=list)
    lean: list[float] = field(default_factory=list)

    def order(self) -> Iterator[tuple[int, Side]]:
        """(pair, side) in the order of the measurement: ours first in even pairs, lean first in odd ones."""
        for pair in range(self.count + 1):
            for side in ("lean", "ours") if pair % 2 else ("ours", "lean"):
                yield pair, side

    def add(self, pair: int, side: Side, seconds: float) -> None:
        """Record one measurement."""
        if pair:
            (self.ours if side == "ours" else self.lean).append(seconds)

    def ratios(self) -> list[float]:
        """Ours / lean of each pair."""
        return [ours / lean for ours, lean in zip(self.ours, self.lean, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The figures of the table, for JSON."""
        ratios = self.ratios()
        return {
            "what": self.what,
            "ours_s": self.ours,
            "lean_s": self.lean,
            "ours_median_s": median(self.ours),
            "lean_median_s": median(self.lean),
            "ratio_median": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }


def compare(what: str, count: int, ours: Callable[[], Any], lean: Callable[[], Any]) -> Pairs:
    """Measure two functions in interleaved pairs."""
    pairs = Pairs(what, count)
    for pair, side in pairs.order():
        began = time.process_time()
        ours() if side == "ours" else lean()
        pairs.add(pair, side, time.process_time() - began)
    return pairs


def print_table(measured: Sequence[Pairs], title: str) -> None:
    """Print one row a comparison, and the machine."""
    table = Table(title=title)
    for name in ("CPU seconds", "ours", "lean", "ratio", "min, max"):
        table.add_column(name, justify="left" if name == "CPU seconds" else "right", no_wrap=True)
    for pairs in measured:
        s = pairs.summary()
        spread = f"{s['ratio_min']:.3f}, {s['ratio_max']:.3f}"
        table.add_row(pairs.what, f"{s['ours_median_s']:.3f}", f"{s['lean_median_s']:.3f}", f"{s['ratio_median']:.3f}", spread)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False, soft_wrap=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
