"""Natural shifts side by side, as a record that every report shows."""

from __future__ import annotations

from collections.abc import Sequence

from ..metrics.effective_robustness import ShiftRow
from .record import Cell, Record, Sheet


def shift_record(rows: Sequence[ShiftRow], name: str = "shifts") -> Record:
    """Accuracies without and with each shift, drop and effective robustness.

    Args:
        rows: of :func:`robust_pl.metrics.effective_robustness.shift_rows`.
        name: first part of the figures' names.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("there is no shift to put into a table: give at least one row")
    columns = ["shift", "without", "with", "drop", "expected", "effective robustness"]
    table: list[list[Cell]] = [[r.shift, r.acc_id, r.acc_ood, r.drop, r.expected, r.effective] for r in rows]
    known = [row.effective for row in rows if row.effective is not None]
    figures = {"accuracy": sum(row.acc_ood for row in rows) / len(rows)}
    if known:
        figures["effective"] = sum(known) / len(known)
    note = (
        "Effective robustness is accuracy under the shift minus what standard networks of the same accuracy without it have, "
        "by a line fitted between logits; `without` is accuracy on the same classes."
    )
    sheet = Sheet("natural shifts", columns, table, share=True)
    return Record("Shifts", name, "Natural shifts", figures, [sheet], notes=[note] if known else [])
