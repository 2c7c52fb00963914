"""What an audit looked at and what it found wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Audit:
    """What an audit looked at, and what it found wrong; ``print`` it for a table.

    Args:
        folder: of the evaluation.
        checked: what was looked at -> how often.
        problems: what was looked at -> sentences.
        skipped: what could not be looked at, and why.
    """

    folder: Path
    checked: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return not any(self.problems.values())

    def check(self, what: str, problem: str | None = None, count: int = 1) -> None:
        """Note that ``what`` was looked at ``count`` times, and what was wrong with it."""
        self.checked[what] = self.checked.get(what, 0) + count
        if problem:
            self.problems.setdefault(what, []).append(problem)

    def __str__(self) -> str:
        table = Table(title=f"audit of {self.folder}: {'passed' if self.passed else 'FAILED'}", title_justify="left")
        for name in ("what", "checked", "wrong"):
            table.add_column(name, justify="left" if name == "what" else "right")
        for what, count in self.checked.items():
            table.add_row(what, str(count), str(len(self.problems.get(what, ()))))
        console = Console(width=110)
        with console.capture() as capture:
            console.print(table)
            for what, problems in self.problems.items():
                for problem in problems[:10]:
                    console.print(f"{what}: {problem}", highlight=False, markup=False)
                if len(problems) > 10:
                    console.print(f"{what}: and {len(problems) - 10} more", highlight=False)
            for reason in self.skipped:
                console.print(f"not checked: {reason}", highlight=False, markup=False)
        return capture.get()
