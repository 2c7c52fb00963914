"""What Square tries: from the best images so far to candidates, as functions of tensors alone.

A proposal takes ``x_best`` and ``x`` (n, C, H, W), the radius, the side of the window and random numbers ``few`` from
U[0, 1), (n, count), in the order in which they are named; it never asks the network. Windows, signs and patterns belong to
each sample. A window's corner may lie anywhere in 0..H-side, the last row and column included; AutoAttack's code rounds
U(0, H - side) down and so leaves those out, and :class:`SquareProposal` does as it says.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...functional.geometry import Norm, project, size
from .draws import Draws

# Iterations of a run of 10000 up to which the window's area stays, before it is halved again.
MILESTONES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


class SquareProposal:
    """Candidates of one norm: ``start`` from clean images, then called with the best ones and the iteration.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        p_init: share of the image that a window covers at first.
        rescale_to: number of iterations to which the schedule is stretched; None keeps that of 10000.
        reach_border: whether windows also lie at the last row and column.
    """

    def __init__(self, norm: Norm, p_init: float = 0.8, rescale_to: int | None = None, *, reach_border: bool = False) -> None:
        self.norm, self.p_init, self.rescale_to, self.reach_border = norm, p_init, rescale_to, reach_border

    def numbers(self, x: Tensor) -> int:
        """How many random numbers a candidate for ``x`` (n, C, H, W) takes."""
        return x.shape[1] + (2 if self.norm == "linf" else 5)

    def side(self, x: Tensor, iteration: int) -> int:
        """Side of the window in pixels."""
        if self.rescale_to is not None:
            iteration = int(iteration / self.rescale_to * 10000)
        share = self.p_init / 2 ** sum(iteration > milestone for milestone in MILESTONES)
        height, width = x.shape[2:]
        side = round(math.sqrt(share * height * width))
        # Halves of a pattern need a middle.
        side = max(side, 1) if self.norm == "linf" else max(side, 3) // 2 * 2 + 1
        return min(side, height, width)

    def start(self, x: Tensor, eps: float | Tensor, draws: Draws) -> Tensor:
        """First images: stripes of eps and -eps for linf, tiles of patterns for l2 and l1."""
        if self.norm == "linf":
            return torch.clamp(x + eps * _sign(draws.uniform(x[:, :, :1])), 0.0, 1.0)
        return _into_ball(_tiles(x, self.norm, draws), x, eps, self.norm)

    def __call__(self, x_best: Tensor, x: Tensor, eps: float | Tensor, iteration: int, few: Tensor) -> Tensor:
        """Candidates (n, C, H, W) inside ball and box."""
        side = self.side(x, iteration)
        if not self.reach_border:
            corners = 2 if self.norm == "linf" else 4
            spans = _spans(*x.shape[2:], side, few)
            places = (spans - 1) / spans if isinstance(spans, int) else ((spans - 1) / spans).repeat(corners // 2)
            few = torch.cat([few[:, :corners] * places, few[:, corners:]], 1)
        if self.norm == "linf":
            return recolour_square(x_best, x, eps, side, few)
        return move_mass(x_best, x, eps, side, few, self.norm)


def recolour_square(x_best: Tensor, x: Tensor, eps: float | Tensor, side: int, few: Tensor) -> Tensor:
    """The perturbation becomes eps or -eps in a square, one sign a channel.

    Args:
        x_best: best images so far, inside ball and box, (n, C, H, W).
        x: clean images.
        eps: radius, a number or (n, 1, 1, 1).
        side: of the windows, in pixels.
        few: row and column of the square, then a sign for each channel, (n, 2 + C).
    """
    height, width = x.shape[2:]
    half = (side - 1) / 2
    spans = _spans(height, width, side, few)
    centre = (few[:, :2] * spans).floor_().add_(half).unsqueeze(2)
    inside = (torch.arange(max(height, width), device=x.device) - centre).abs_() <= half
    square = inside[:, 0, :height, None] & inside[:, 1, None, :width]
    coloured = torch.add(x, eps * _sign(few[:, 2:]).to(x.dtype)[:, :, None, None]).clamp_(0, 1)
    return torch.where(square.unsqueeze(1), coloured, x_best)


def move_mass(x_best: Tensor, x: Tensor, eps: float | Tensor, side: int, few: Tensor, norm: Norm) -> Tensor:
    """The perturbation of one window goes to another, which gets a pattern on top, and the whole fills the ball.

    Args:
        x_best: best images so far, inside ball and box, (n, C, H, W).
        x: clean images.
        eps: radius, a number or (n, 1, 1, 1).
        side: of the windows, in pixels.
        few: row and column of the window that is written, those of the window that is emptied, whether the pattern is turned,
            then a sign for each channel, (n, 5 + C).
        norm: ``l2`` or ``l1``.
    """
    channels, height, width = x.shape[1:]
    corners = (few[:, :4].unflatten(1, (2, 2)) * _spans(height, width, side, few)).long()
    window = torch.arange(side, device=x.device)
    offsets = (window[:, None] * width + window).flatten()
    places = (corners[:, :, :1] * width + corners[:, :, 1:] + offsets).unsqueeze(2).expand(-1, -1, channels, -1)
    written, emptied = places.unbind(1)

    delta = (x_best - x).flatten(2)
    unused = (_power(eps, norm) - _power(delta, norm).sum((1, 2), keepdim=True).view(-1, 1, 1, 1)).clamp_min_(0).flatten(1)
    old = delta.gather(2, written)
    delta = delta.scatter(2, written, 0)
    # What both windows share is counted once.
    in_written = _power(old, norm).sum(2, keepdim=True)
    in_both = in_written + _power(delta.gather(2, emptied), norm).sum(2, keepdim=True)

    turned = (few[:, 4] < 0.5).long()
    shape = pattern(side, norm, x.dtype, x.device).flatten(1)[turned].unsqueeze(1)
    new = shape * _sign(few[:, 5:]).to(x.dtype).unsqueeze(2) + old / (_root(in_written, norm) + _TINY)
    target = _root(unused.unsqueeze(2) / channels + in_both, norm)
    if norm == "l1":
        target = target * channels
    new = new * (target / (_root(_power(new, norm).sum(2, keepdim=True), norm) + _TINY))
    delta = delta.scatter(2, emptied, 0).scatter(2, written, new)
    return _into_ball(delta.view_as(x), x, eps, norm)


@lru_cache(maxsize=256)
def pattern(side: int, norm: Norm, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two bumps of opposite sign one above the other, and the same side by side, each of size one: (2, side, side)."""
    upper, lower = _bump(side // 2, side, norm), _bump(side - side // 2, side, norm)
    bumps = torch.cat([upper, -lower])
    bumps = bumps / size(bumps.unsqueeze(0), norm)
    return torch.stack([bumps, bumps.T]).to(device, dtype)


def _bump(rows: int, columns: int, norm: Norm) -> Tensor:
    """Nested rectangles round the middle, the one of radius r with the weight (r + 1)**-2 for l2 and (r + 1)**-4 for l1."""
    if not rows:
        return torch.zeros(0, columns, dtype=torch.float64)
    vertical = (torch.arange(rows) - rows // 2).abs()
    horizontal = (torch.arange(columns) - columns // 2).abs()
    distance = torch.maximum(vertical[:, None], horizontal)
    radii = torch.arange(1, max(rows // 2, columns // 2) + 2, dtype=torch.float64)
    weights = radii ** (-2 if norm == "l2" else -4)
    bump = weights.flip(0).cumsum(0).flip(0)[distance]  # a pixel lies in all rectangles from its distance on
    return bump / size(bump.unsqueeze(0), norm)


def _tiles(x: Tensor, norm: Norm, draws: Draws) -> Tensor:
    """The image covered with patterns, five by five where it is large enough, (B, C, H, W)."""
    delta = torch.zeros_like(x)
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    signs = _sign(draws.uniform(x[:, :, :rows, :columns])).to(x.dtype)[..., None, None]
    turned = (draws.uniform(x[:, :1, :rows, :columns]) < 0.5).long()
    tiles = (pattern(side, norm, x.dtype, x.device)[turned] * signs).transpose(3, 4)
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiles.reshape(
        -1, channels, rows * side, columns * side
    )
    return delta


def _into_ball(delta: Tensor, x: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    if norm == "l1":
        return project(x + delta, x, eps, "l1")
    length = size(delta, "l2").view(-1, 1, 1, 1)
    return torch.clamp(x + delta * (eps / (length + _TINY)), 0.0, 1.0)


def _spans(height: int, width: int, side: int, few: Tensor) -> Tensor | int:
    """Number of places for a window along rows and columns."""
    if height == width:
        return height - side + 1
    return torch.tensor([height - side + 1, width - side + 1], device=few.device)


def _sign(uniform: Tensor) -> Tensor:
    return (uniform < 0.5) * 2.0 - 1.0


def _power(values: Tensor | float, norm: Norm) -> Tensor | float:
    return values * values if norm == "l2" else abs(values)


def _root(values: Tensor, norm: Norm) -> Tensor:
    return values.sqrt() if norm == "l2" else values
