"""Arguments that several single-step methods check alike."""

from __future__ import annotations


def check_label_factor(label_factor: float | None, num_classes: int) -> None:
    """Refuse labels in which the right class is not the largest.

    Raises:
        ValueError: if the factor is not above 1 / K and at most 1.
    """
    if label_factor is not None and not 1 / num_classes < label_factor <= 1:
        raise ValueError(
            f"label_factor={label_factor} is the label of the right class: choose from (1/{num_classes}, 1], or leave it out"
        )
