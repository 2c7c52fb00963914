"""What a method needs beside its attack where it crafts: the radius of each sample, and random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...callbacks.attacks.checks import per_sample_eps
from ...callbacks.attacks.draws import StreamDraws, seed_from
from ..base import Method


def radius_of(method: Method, x: Tensor, eps: Tensor | None) -> float | Tensor:
    """Of the ball around pixels (B, C, H, W): the attack's, unless each sample has its own, (B, 1, 1, 1)."""
    radius = method.attack.eps if eps is None else eps
    return per_sample_eps(radius, x) if isinstance(radius, Tensor) else float(radius)


def draws_of(method: Method, what: str, device: torch.device) -> StreamDraws:
    """Random numbers of this step and process, named by what they are for.

    They are keyed by the attack's calls, which checkpoints keep, so a resumed run draws what an uninterrupted one does.
    """
    return StreamDraws(seed_from(method.attack.seed, method.global_rank, method.attack.calls, what), device)
