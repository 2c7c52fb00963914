"""Radii as the field writes them."""

from __future__ import annotations

import math
from typing import Any

SYMBOLS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


def radius(eps: Any, norm: str | None = None) -> str:
    """A radius as text: ``8/255`` for linf, decimals otherwise; text stays as it is, and what is unknown is empty."""
    if eps is None or isinstance(eps, str):
        return eps or ""
    if getattr(eps, "text", None):
        return eps.text
    if math.isinf(eps):
        return "unbounded"
    levels = 255 * eps
    if norm == "linf" and eps > 0 and abs(levels - round(levels, 1)) < 1e-3:
        return f"{round(levels, 1):g}/255"
    return f"{eps:.4g}"
