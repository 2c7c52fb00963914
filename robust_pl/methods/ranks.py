"""State that differs between processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` of every process, in order of rank, on every process; all of them must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all processes, on every process, all of which must call it; a tensor of its own. Nothing waits for it."""
    tensor = tensor.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all processes, see :func:`sum_over_ranks`."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return sum_over_ranks(tensor) / (torch.distributed.get_world_size() if several else 1)
