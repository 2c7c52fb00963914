"""Balls and boxes: sizes, projections and steepest steps of perturbations under linf, l2 and l1.

Every function works per sample on tensors of shape (B, ...). ``eps`` is a number or a tensor of shape (B, 1, 1, 1), in
units of the pixel range [0, 1]. None of them loops over samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[str, ...] = ("linf", "l2", "l1")
L1_QUANTILE = 0.99
_TINY = 1e-12


def size(delta: Tensor, norm: Norm) -> Tensor:
    """Size of each perturbation: (B, ...) -> (B,)."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    return flat.norm(p=2 if norm == "l2" else 1, dim=1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def steepest(gradient: Tensor, norm: Norm, l1_quantile: float = L1_QUANTILE) -> Tensor:
    """Direction of size one in ``norm`` along which the objective rises fastest.

    linf: the sign; l2: the normalised gradient; l1: the signs of the largest entries, those above the quantile
    ``l1_quantile`` of each sample and at least one, as SLIDE does it (Tramèr and Boneh 2019, arXiv 1904.13000): the exact
    steepest direction would move one pixel a step.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        # Squares of small gradients underflow, and a step that dies out looks like robustness.
        largest = _column(size(gradient, "linf"), gradient)
        scaled = gradient / torch.where(largest > 0, largest, 1.0)
        return scaled / _column(size(scaled, "l2"), scaled).clamp_min(_TINY)
    flat = gradient.flatten(1)
    kept = max(1, round((1 - l1_quantile) * flat.shape[1]))
    top = flat.abs().topk(kept, dim=1).indices
    signs = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


def project(x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Nearest point, or for l2 a near one, of the eps-ball around ``x`` that lies in the box [0, 1].

    linf and l1 are exact projections on ball and box together. For l2 the ball comes first and the box second, the order
    that the field uses: clipping afterwards only shrinks the perturbation.
    """
    if norm == "linf":
        return torch.clamp(torch.minimum(torch.maximum(x_adv, x - eps), x + eps), 0.0, 1.0)
    delta = x_adv - x
    if norm == "l2":
        shrink = (eps / _column(size(delta, "l2"), delta).clamp_min(_TINY)).clamp(max=1.0)
        return torch.clamp(x + delta * shrink, 0.0, 1.0)
    return torch.clamp(x + _project_l1_box(delta, x, eps), 0.0, 1.0)


def _project_l1_box(delta: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """Exact projection on {|d|_1 <= eps} and {0 <= x + d <= 1} (Croce and Hein 2021, arXiv 2103.01208).

    The answer keeps the signs and has the magnitudes min(clipped, max(full - level, 0)) for the smallest level >= 0 that
    fits the budget. That total falls piecewise linearly in the level, so one sort of the 2D breakpoints finds it.
    """
    full = delta.flatten(1).double().abs()
    clipped = ((x + delta).clamp(0.0, 1.0) - x).flatten(1).double().abs()
    budget = torch.as_tensor(eps, dtype=full.dtype, device=full.device).reshape(-1, 1).expand(len(full), 1)

    # Above full - clipped an entry starts to shrink with the level, above full it is zero.
    levels, order = torch.cat([full - clipped, full], 1).sort(1)
    slope_changes = torch.cat([-torch.ones_like(full), torch.ones_like(full)], 1).gather(1, order)
    slopes = slope_changes.cumsum(1)
    gaps = torch.diff(levels, dim=1, append=levels[:, -1:])
    totals = clipped.sum(1, keepdim=True) + torch.cat([torch.zeros_like(budget), (slopes * gaps).cumsum(1)[:, :-1]], 1)
    segment = ((totals > budget).sum(1, keepdim=True) - 1).clamp_min(0)
    slope = slopes.gather(1, segment).clamp(max=-1.0)
    level = levels.gather(1, segment) + (budget - totals.gather(1, segment)) / slope
    level = torch.where(totals[:, :1] > budget, level, torch.zeros_like(level))
    magnitude = torch.minimum(clipped, (full - level).clamp_min(0.0))
    return (magnitude * delta.flatten(1).sign()).view_as(delta).to(delta.dtype)


def rho_adv(x_adv: Tensor, x: Tensor, norm: Norm = "l2") -> Tensor:
    """Mean of ||x_adv - x|| / ||x|| over samples (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599), a scalar."""
    return (size(x_adv - x, norm) / size(x, norm)).mean()
