"""The smallest step onto a hyperplane inside the box [0, 1], under linf, l2 and l1."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Norm


def to_hyperplane(x: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The delta of least ``norm`` with ``<normal, delta> = -gap`` and ``x + delta`` in [0, 1], exactly.

    Where the box does not reach the hyperplane, delta leads to the corner nearest to it. Coordinates with a normal of zero
    stay. Under linf and l1 there may be several such deltas: linf moves every coordinate by the same amount as far as the box
    lets it; l1 moves those with the largest weights in ``normal`` first, the first of equals first.

    Scaling normal and gap together changes nothing, however small they are. Public codes hold coordinates with
    a weight below 1e-8 still under l2 and l1, so that they do not move at all on a network with tiny gradients.

    Args:
        x: points in the box (..., D).
        normal: of the hyperplane, (..., D); its leading dimensions broadcast with those of ``x``.
        gap: how far ``<normal, x>`` lies above its value on the hyperplane, (...), of either sign.
        norm: what to keep small.

    Returns:
        delta (..., D).
    """
    largest = normal.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    weight, need = normal.abs() / largest, gap.abs().unsqueeze(-1) / largest
    direction = -normal.sign() * torch.where(gap >= 0, 1.0, -1.0).to(x.dtype).unsqueeze(-1)
    room = (direction.clamp_min(0) - direction * x).clamp_min(0)  # x downwards, 1 - x upwards, 0 where the normal is 0
    if norm == "l1":
        return direction * _largest_first(weight, room, need)
    return direction * _common_level(weight, weight.sign() if norm == "linf" else weight, room, need)


def _common_level(weight: Tensor, rate: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Lengths ``min(level * rate, room)`` for the smallest level at which ``sum(weight * length)`` is ``need``.

    That sum is concave and piecewise linear in the level, so Newton's method climbs from 0 to the answer without stepping
    over it and stands still once the coordinates that have used up their room are the right ones: a few rounds, no sorting.
    """
    full_at = room / rate  # NaN where both are 0: such a coordinate is never free, which is right
    slopes, gains = weight * rate, weight * room
    level = torch.zeros_like(need)
    while True:
        # Products, as masking is several times slower on a CPU.
        free = (full_at > level).to(room.dtype)
        slope = (slopes * free).sum(-1, keepdim=True)
        rest = need - (gains * (1 - free)).sum(-1, keepdim=True)
        higher = torch.where(slope > 0, rest / slope, torch.where(rest > 0, torch.inf, level))
        if not (higher > level).any():
            return torch.minimum(level.clamp(max=torch.finfo(level.dtype).max) * rate, room)
        level = torch.maximum(level, higher)


def _largest_first(weight: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Lengths that use up the room of the largest weights, until ``sum(weight * length)`` is ``need``."""
    ordered, order = weight.sort(dim=-1, descending=True, stable=True)
    ordered, order = ordered.expand_as(room), order.expand_as(room)
    room = room.gather(-1, order)
    after = (ordered * room).cumsum(-1, dtype=torch.float64)
    # What is left for each when its turn comes: for all but one it is either more than it can take, or nothing.
    left = need - torch.nn.functional.pad(after[..., :-1], (1, 0))
    length = (left / ordered.clamp_min(torch.finfo(ordered.dtype).tiny)).clamp_min(0).to(room.dtype)
    return torch.empty_like(room).scatter_(-1, order, torch.minimum(length, room))
