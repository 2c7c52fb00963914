"""Compare the time of pieces of code on a machine that is not idle: interleaved rounds, median ratios."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

Side = Literal["ours", "lean"]
CPU = torch.device("cpu")


def now(device: torch.device = CPU) -> float:
    """Seconds on the clock that a benchmark reads before and after: only differences have a meaning.

    On a CPU this is the time of all threads of this process, so that a busy machine disturbs it less than wall time. On CUDA
    it is wall time after all that was asked of the device is done.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def unit(device: torch.device = CPU) -> str:
    """What :func:`now` counts."""
    return "wall seconds" if device.type == "cuda" else "CPU seconds"


class Rounds:
    """Seconds of several sides, round by round; round 0 is the warm-up and not counted.

    Caches and clock rates are shared with whatever else the machine does: hence a ratio is taken only within a round, and each
    round begins with another side, so that none always comes first.

    Args:
        what: what is measured, a few words.
        count: number of rounds after the warm-up.
        sides: their names.
    """

    def __init__(self, what: str, count: int, sides: Iterable[str]) -> None:
        self.what, self.count, self.sides = what, count, tuple(sides)
        self.seconds: dict[str, list[float]] = {side: [] for side in self.sides}

    def order(self) -> Iterator[tuple[int, Any]]:
        """(round, side) in the order of the measurement: as they were named in round 0, one place further in each round."""
        for turn in range(self.count + 1):
            first = turn % len(self.sides)
            for side in self.sides[first:] + self.sides[:first]:
                yield turn, side

    def add(self, turn: int, side: str, seconds: float) -> None:
        """Record one measurement."""
        if turn:
            self.seconds[side].append(seconds)

    def run(self, work: Mapping[str, Callable[[], Any]], device: torch.device = CPU) -> None:
        """Measure one function a side."""
        for turn, side in self.order():
            began = now(device)
            work[side]()
            self.add(turn, side, now(device) - began)

    def ratios_of(self, side: str, to: str) -> list[float]:
        """Seconds of ``side`` / seconds of ``to`` in each round."""
        return [a / b for a, b in zip(self.seconds[side], self.seconds[to], strict=True)]

    def figures(self, to: str) -> dict[str, dict[str, Any]]:
        """Side -> its seconds, their median, and its ratios to the side ``to``, for a table and for JSON."""
        found = {}
        for side in self.sides:
            ratios = self.ratios_of(side, to)
            found[side] = {
                "seconds": self.seconds[side],
                "median_s": median(self.seconds[side]),
                "ratio_median": median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        return found


class Pairs(Rounds):
    """Rounds of two sides: ours first in even pairs, lean first in odd ones.

    Args:
        what: what is measured, a few words.
        count: number of pairs after the warm-up.
        ours: seconds that were measured already, those of ``lean`` likewise.
        lean: of the other side.
    """

    def __init__(self, what: str, count: int, ours: Sequence[float] = (), lean: Sequence[float] = ()) -> None:
        super().__init__(what, count, ("ours", "lean"))
        self.seconds = {"ours": list(ours), "lean": list(lean)}

    @property
    def ours(self) -> list[float]:
        """Seconds of ours."""
        return self.seconds["ours"]

    @property
    def lean(self) -> list[float]:
        """Seconds of the other side."""
        return self.seconds["lean"]

    def ratios(self) -> list[float]:
        """Ours / lean of each pair."""
        return self.ratios_of("ours", "lean")

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


def compare(what: str, count: int, ours: Callable[[], Any], lean: Callable[[], Any], device: torch.device = CPU) -> Pairs:
    """Measure two functions in interleaved pairs."""
    pairs = Pairs(what, count)
    pairs.run({"ours": ours, "lean": lean}, device)
    return pairs


def print_table(measured: Sequence[Pairs], title: str, device: torch.device = CPU) -> None:
    """Print one row a comparison, and the machine."""
    table = Table(title=title)
    for name in (unit(device), "ours", "lean", "ratio", "min, max"):
        table.add_column(name, justify="left" if name == unit(device) else "right", no_wrap=True)
    for pairs in measured:
        s = pairs.summary()
        spread = f"{s['ratio_min']:.3f}, {s['ratio_max']:.3f}"
        table.add_row(pairs.what, f"{s['ours_median_s']:.3f}", f"{s['lean_median_s']:.3f}", f"{s['ratio_median']:.3f}", spread)
    console = Console()
    console.print(table)
    print_machine(console, device)


def print_machine(console: Console, device: torch.device = CPU) -> None:
    """Print what the figures depend on, in one line."""
    console.print(", ".join(f"{key} {value}" for key, value in machine(device).items()), highlight=False, soft_wrap=True)


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
