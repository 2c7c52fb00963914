"""The samples on which an attack shows most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from .pictures import Caption, grid
from .table import Table
from .units import SYMBOLS

By = Literal["norm", "confidence"]


def worst_samples(table: Table, attack: str, count: int = 8, by: By = "norm") -> np.ndarray:
    """Rows of the table, at most ``count``, on which the network is right and the attack fools it most.

    Args:
        table: outcomes.
        attack: name of the attack.
        count: how many.
        by: ``norm`` takes the smallest perturbations first, and of equal ones the most confident; ``confidence`` those
            first whose clean image the network was most sure of.

    Raises:
        ValueError: if there is no such attack or order, or the table lacks a column that it needs.
    """
    if by not in ("norm", "confidence"):
        raise ValueError(f"by={by!r} is unknown: choose norm or confidence")
    fooled = np.flatnonzero(table.right() & ~table.right(attack))
    confidence = table.columns.get("confidence", np.zeros(len(table)))[fooled]
    if by == "confidence":
        return fooled[np.argsort(-confidence, kind="stable")[:count]]
    # Perturbations at the rim of a ball differ by rounding only.
    sizes = _sizes(table, attack)[fooled].round(5)
    return fooled[np.lexsort((-confidence, sizes))[:count]]


def worst_images(
    table: Table,
    attack: str,
    rows: Sequence[int] | np.ndarray,
    x: Tensor,
    x_adv: Tensor,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """Clean, adversarial and magnified difference of some samples, with predictions and sizes.

    Args:
        table: outcomes.
        attack: name of the attack.
        rows: of the table, see :func:`worst_samples`.
        x: clean pixels of these samples, in this order, (n, C, H, W) in [0, 1].
        x_adv: attacked pixels, alike.
        class_names: None shows the numbers of the classes.

    Raises:
        ValueError: if there is no sample, or there are not as many images as rows.
    """
    if not len(rows) or not len(rows) == len(x) == len(x_adv):
        given = f"{len(rows)} rows, {len(x)} clean and {len(x_adv)} attacked images"
        raise ValueError(f"{given}: give as many of each, and at least one")
    label, before, after = (table.columns[name][rows] for name in ("label", "prediction", f"prediction_{attack}"))
    norm = table.about(attack).get("norm", "linf")
    sizes = [f"{255 * s:.3g}/255" if norm == "linf" else f"{s:.3g}" for s in _sizes(table, attack)[rows].tolist()]
    captions: list[list[Caption]] = [
        _said(before, label, class_names),
        _said(after, label, class_names),
        [(f"{SYMBOLS[norm]} {size}", True) for size in sizes],
    ]
    return grid(x.float().cpu(), x_adv.float().cpu(), captions)


def _said(classes: np.ndarray, label: np.ndarray, names: Sequence[str] | None) -> list[Caption]:
    pairs = zip(classes.tolist(), label.tolist(), strict=True)
    return [(str(said) if names is None else names[said], said == y) for said, y in pairs]


def _sizes(table: Table, attack: str) -> Any:
    norm = table.about(attack).get("norm", "linf")
    if f"{norm}_{attack}" not in table.columns:
        raise ValueError(f"the table lacks {norm}_{attack}, the size of the perturbations: take by='confidence' or measure it")
    return table.columns[f"{norm}_{attack}"]
