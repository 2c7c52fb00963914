"""Tables of accuracies and errors under corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from ...functional.corruption_error import corruption_errors, relative_corruption_errors
from ...functional.corruptions.tables import BENCHMARK
from ...report.record import Cell, Sheet


def accuracy_sheet(accuracy: Mapping[str, Sequence[float]], severities: Sequence[int]) -> Sheet:
    """Accuracy under each corruption, at each severity and in the mean."""
    columns = ["corruption", *(f"severity {severity}" for severity in severities), "mean"]
    return Sheet("accuracy", columns, [[name, *row, fmean(row)] for name, row in accuracy.items()], share=True)


def error_sheet(
    errors: Mapping[str, Sequence[float]],
    clean_error: float,
    baseline: Mapping[str, float],
    baseline_clean_error: float,
    title: str,
) -> tuple[Sheet, dict[str, float]]:
    """Errors relative to a baseline's, and the figures ``mce`` and ``relative_mce``, means over what the benchmark has of them.

    Args:
        errors: corruption -> error at each severity.
        clean_error: without corruption.
        baseline: corruption -> its mean error.
        baseline_clean_error: its error without corruption.
        title: whose it is.
    """
    absolute = corruption_errors(errors, baseline)
    relative = relative_corruption_errors(errors, clean_error, baseline, baseline_clean_error)
    rows: list[list[Cell]] = [
        [name, fmean(row), baseline[name], absolute.get(name), relative.get(name)] for name, row in errors.items()
    ]
    figures = {}
    for key, found in (("mce", absolute), ("relative_mce", relative)):
        among = [name for name in errors if name in BENCHMARK] or list(errors)
        if all(name in found for name in among):
            figures[key] = fmean(found[name] for name in among)
    rows.append(["mean", None, None, figures.get("mce"), figures.get("relative_mce")])
    columns = ["corruption", "error", "baseline", "CE", "relative CE"]
    return Sheet(f"errors, relative to {title}", columns, rows, share=True), figures
