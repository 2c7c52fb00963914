"""One finding of the audit, and how a report shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Flag:
    """What one check found.

    Args:
        name: of the check, for machines: ``zero_gradient``, ``randomized``, ...
        raised: whether robust accuracy of this network, as attacks measure it, should not be believed.
        value: what was measured; None where it could not be.
        threshold: the flag is raised beyond it; None where nothing was measured.
        message: the same for people, in one sentence, with the numbers.
    """

    name: str
    raised: bool
    value: float | None
    threshold: float | None
    message: str


def as_json(flags: Sequence[Flag]) -> list[dict[str, Any]]:
    """The flags as ``json.dump`` takes them."""
    return [asdict(flag) for flag in flags]


def as_table(flags: Sequence[Flag], title: str = "gradient masking") -> Table:
    """The flags as people read them, those that are raised first."""
    raised = sum(flag.raised for flag in flags)
    table = Table(title=f"{title}: {raised} of {len(flags)} flags raised", title_justify="left")
    table.add_column("flag")
    table.add_column("raised")
    table.add_column("value", justify="right")
    table.add_column("threshold", justify="right")
    table.add_column("what was seen")
    for flag in sorted(flags, key=lambda flag: not flag.raised):
        numbers = ["" if number is None else f"{number:.3g}" for number in (flag.value, flag.threshold)]
        table.add_row(flag.name, "[red]yes[/red]" if flag.raised else "no", *numbers, flag.message)
    return table
