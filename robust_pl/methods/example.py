"""What a method's loss sees of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Example:
    """A batch after the training attack.

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

    @staticmethod
    def join(parts: Sequence[Example]) -> Example:
        """The micro-batches of one optimizer step as one example."""
        if len(parts) == 1:
            return parts[0]
        x_adv = None if parts[0].x_adv is None else torch.cat([p.x_adv for p in parts if p.x_adv is not None])
        return Example(*(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "y", "index")), x_adv)
