"""State of a method whose size the data tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LateBuffers(nn.Module):
    """Buffers that are empty until the first batch of a run, or its checkpoint, tells their sizes.

    Begin and move them alike on all processes: DDP sends those of the first process to all others, but only from the step on
    that follows the one in which they began.

    Args:
        names: of the buffers.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.zeros(0))

    @property
    def empty(self) -> bool:
        """Whether there is nothing in them yet."""
        return all(buffer.numel() == 0 for buffer in self.buffers())

    def begin(self, **values: Tensor) -> None:
        """Give buffers their sizes and first values."""
        for name, value in values.items():
            setattr(self, name, value)

    def make_room(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Take the sizes of a checkpoint's tensors, which are loaded next.

        Args:
            tensors: the state dict of the whole method.
            prefix: what this module is called in it.
        """
        for name, buffer in self.named_buffers():
            if f"{prefix}.{name}" in tensors:
                setattr(self, name, buffer.new_zeros(tensors[f"{prefix}.{name}"].shape))
