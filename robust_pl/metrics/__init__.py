"""Metrics with sum states: exact on any number of processes."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AttackCost": "cost",
        "Baseline": "effective_robustness",
        "ClassAccuracy": "accuracy",
        "ClassErrors": "class_errors",
        "Row": "scoreboard",
        "Scoreboard": "scoreboard",
        "ShiftRow": "effective_robustness",
        "shift_rows": "effective_robustness",
        "standard_baseline": "effective_robustness",
    },
)
