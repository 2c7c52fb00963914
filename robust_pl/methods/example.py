"""What a method's loss sees of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass
class Example:
    """A batch after the training attack. A method that needs more of each sample adds fields in a subclass.

    Args:
        x: clean pixels (B, C, H, W) in [0, 1].
        y: labels int64 (B,), or float (B, K) if mixed.
        index: position of each sample in the training set, int64 (B,).
        x_adv: attacked pixels (B, C, H, W); None where the method has no attack.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    x_adv: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The micro-batches of one optimizer step as one example: every tensor is concatenated, whatever a subclass adds."""
        first = parts[0]
        if len(parts) == 1:
            return first
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(first)}
        joined = {name: torch.cat(c) if isinstance(c[0], Tensor) else c[0] for name, c in columns.items()}
        return type(first)(**joined)
