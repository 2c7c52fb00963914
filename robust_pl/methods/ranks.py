"""State that differs between processes."""

from __future__ import annotations

from typing import Any

import torch


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` of every process, in order of rank, on every process; all of them must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
