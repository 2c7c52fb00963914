"""SimBA: one basis vector at a time, down or up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...functional.geometry import Norm
from .checks import Number, check_step_size
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, QueryObjective, Search


class SimBA(QueryAttack):
    """SimBA (Guo et al. 2019, arXiv 1905.07121), over pixels or, with ``freq_dims``, over low frequencies (SimBA-DCT).

    Basis vectors q come in a random order. Each is tried as x - step_size * q, and if that does not help as x + step_size * q;
    the first that lowers the probability of the label stays. After the last vector the order starts again. With T steps
    taken the perturbation is at most step_size * sqrt(T) long in l2, and never longer than ``eps``: candidates are projected
    into ball and box. Under linf a pixel thus moves by min(step_size, eps).

    Every sample has an order of its own and goes through it at its own pace, so that each query is one that it needed.
    Published ports share one order in a batch, and query the second direction also for samples that took the first,
    without charging them. A step that the box cuts to nothing still costs its query, as in those.

    Cost: up to ``n_queries`` forward passes a sample, the one at x included, none after its first success, no backward pass.

    Args:
        eps: radius; see :class:`Attack`, and so all others.
        step_size: length of a step.
        n_queries: most queries of a sample, at least 1.
        freq_dims: None for pixels; or as many of the lowest frequencies in each direction as the discrete cosine basis is
            made of, at most the side of the image. Published: 32, or 28 for images of 224.
        objective: what has to rise: ``ce`` is the paper's, as it rises where the probability falls; ``margin`` also tells
            two images apart whose probability rounds to 1.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        eps: Number | Tensor = 3.0,
        step_size: Number = 0.2,
        *,
        norm: Norm = "l2",
        n_queries: int = 10000,
        freq_dims: int | None = None,
        targeted: bool = False,
        objective: QueryObjective = "ce",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps, n_queries=n_queries, norm=norm, targeted=targeted, objective=objective, bn_mode=bn_mode, seed=seed
        )
        if freq_dims is not None and (not isinstance(freq_dims, int) or freq_dims < 1):
            raise ValueError(f"freq_dims={freq_dims} must be a whole number of at least 1, such as 32; leave it out for pixels")
        self.step_size = check_step_size(step_size)
        self.freq_dims = freq_dims

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        low = max(x.shape[2:]) if self.freq_dims is None else self.freq_dims
        search = Search(problem, x, self.n_queries)
        search.kept["order"] = problem.draws.uniform(x[:, :, :low, :low]).flatten(1).argsort(1)
        search.kept["tried"] = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        search.kept["up"] = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        while search.goes_on():
            order, tried, up = (search.kept[key] for key in ("order", "tried", "up"))
            which = order.gather(1, (tried % order.shape[1]).unsqueeze(1)).squeeze(1)
            direction = pixel(which, search.x_best) if self.freq_dims is None else cosine(which, search.x_best, low)
            step = torch.where(up, self.step_size, -self.step_size).to(x.dtype).view(-1, 1, 1, 1)
            accepted = search.offer(search.problem.project(search.x_best + step * direction))
            finished = accepted | up
            search.kept["tried"], search.kept["up"] = tried + finished, ~finished
        return search.result()


def pixel(which: Tensor, like: Tensor) -> Tensor:
    """Images (n, C, H, W) that are 1 at the position ``which`` (n,) of the flattened image and 0 elsewhere."""
    return torch.zeros_like(like).flatten(1).scatter(1, which.unsqueeze(1), 1).view_as(like)


def cosine(which: Tensor, like: Tensor, low: int) -> Tensor:
    """Vectors of the orthonormal cosine basis (DCT-II), as images (n, C, H, W) of length 1.

    Args:
        which: position in the flattened (C, low, low) frequencies, (n,).
        like: images (n, C, H, W).
        low: frequencies in each direction; those that the image does not have are left out.
    """
    channels, height, width = like.shape[1:]
    rows, columns = min(low, height), min(low, width)
    channel = torch.eye(channels, dtype=like.dtype, device=like.device)[which // (rows * columns)]
    vertical = _waves(height, like)[which // columns % rows]
    horizontal = _waves(width, like)[which % columns]
    return channel[:, :, None, None] * vertical[:, None, :, None] * horizontal[:, None, None, :]


def _waves(side: int, like: Tensor) -> Tensor:
    """Frequencies (rows) of the orthonormal DCT-II of ``side`` pixels, (side, side)."""
    frequency, place = torch.arange(side).unsqueeze(1).double(), torch.arange(side) + 0.5
    waves = torch.cos(math.pi / side * frequency * place) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)
