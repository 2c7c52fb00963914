"""One line an attack: what stood, what stands, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .table import Table
from .wilson import interval

CLEAN, WORST = "none (clean)", "worst of all"
HEADINGS = ("attack", "accuracy", "worst so far", "95 % interval", "forward", "backward", "seconds")


@dataclass(frozen=True)
class Line:
    """A line of the summary.

    Args:
        name: of the attack, or of a part of it.
        right: samples on which the network is right; for a part, those that stand after it.
        standing: samples that stand after this and all attacks above, the worst case so far.
        total: number of samples.
        forwards: forward passes per sample; None where nothing is known.
        backwards: backward passes, likewise.
        seconds: for all samples, likewise.
        part: whether this is a part of the attack above.
    """

    name: str
    right: int
    standing: int
    total: int
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None
    part: bool = False

    @property
    def accuracy(self) -> float:
        """Share of samples on which the network is right, in [0, 1]."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return interval(self.right, self.total)


def summarise(table: Table) -> list[Line]:
    """Lines for the clean images, for each attack in order and its parts, and for the worst case over all of them."""
    total = len(table)
    standing = table.right()
    lines = [Line(CLEAN, int(standing.sum()), int(standing.sum()), total)]
    for attack in table.attacks:
        right, before = table.right(attack), standing
        standing = before & right
        seconds = table.about(attack).get("seconds")
        passes = [_mean(table, f"{kind}_{attack}") for kind in ("forwards", "backwards")]
        lines.append(Line(attack, int(right.sum()), int(standing.sum()), total, *passes, seconds))
        for part, stands in table.parts(attack).items():
            lines.append(Line(part, int(stands.sum()), int((before & stands).sum()), total, part=True))
    if table.attacks:
        whole = [line for line in lines[1:] if not line.part]
        spent = [_sum([getattr(line, kind) for line in whole]) for kind in ("forwards", "backwards", "seconds")]
        lines.append(Line(WORST, int(standing.sum()), int(standing.sum()), total, *spent))
    return lines


def cells(line: Line) -> tuple[str, ...]:
    """A line as text, one cell for each of :data:`HEADINGS`."""
    low, high = line.interval
    spent = (line.forwards, line.backwards, line.seconds)
    return (
        line.name,
        f"{line.accuracy:.2%}",
        f"{line.standing / line.total:.2%}",
        f"[{100 * low:.2f}, {100 * high:.2f}]",
        *("" if number is None else f"{number:,.1f}" for number in spent),
    )


def _mean(table: Table, name: str) -> float | None:
    return float(table.columns[name].mean()) if name in table.columns else None


def _sum(numbers: Sequence[float | None]) -> float | None:
    return None if any(number is None for number in numbers) else sum(numbers)
