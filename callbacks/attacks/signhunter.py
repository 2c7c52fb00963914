"""SignHunter: divide and conquer over the signs of the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import DEFAULT_EPS, Number
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, QueryObjective, Search, always


class SignHunter(QueryAttack):
    """SignHunter (Al-Dujaili and O'Reilly 2020, arXiv 1902.06894; from memory of the paper) under linf.

    Each image stands at a corner of its ball, x + eps * s, with s = 1 at first. The signs of the whole image are flipped,
    then of each half, each quarter, down to single values, in the order of the flattened (C, H, W); a flip that does not
    lower the objective stays. One pass over all d = C * H * W values takes about 2d queries, and on a linear network ends at
    the worst corner. The next pass has the image reached as its centre, s = 1 again, and is projected into the ball; its
    first image is taken whatever its objective, so a sample that still stands may end a little lower than it once was.

    Published codes query x itself and the start twice; here the first query is at x + eps, and no random number is drawn.

    Cost: up to ``n_queries`` forward passes a sample, none after its first success, no backward pass.

    Args:
        n_queries: most queries of a sample, at least 1.
        eps: see :class:`Attack`, and so all others.
        objective: what has to rise: ``margin`` or ``ce``.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        n_queries: int = 5000,
        targeted: bool = False,
        objective: QueryObjective = "margin",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps, n_queries=n_queries, random_start=False, targeted=targeted, objective=objective, bn_mode=bn_mode, seed=seed
        )

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        search = Search(problem, problem.project(x + problem.eps), self.n_queries)
        search.kept["centre"], search.kept["sign"] = x, torch.ones_like(x)
        while self._pass_over(search):
            search.kept["centre"], search.kept["sign"] = search.x_best, torch.ones_like(search.x_best)
            search.offer(self._corner(search, search.kept["sign"]), accept=always)
        return search.result()

    def _pass_over(self, search: Search) -> bool:
        """Try all chunks once; whether queries and samples are left for another pass."""
        for chunk in chunks(search.x_best[0].numel()):
            if not search.goes_on():
                return False
            flipped = search.kept["sign"].flatten(1).clone()
            flipped[:, chunk].neg_()
            flipped = flipped.view_as(search.x_best)
            stays = search.offer(self._corner(search, flipped), accept=torch.ge)
            search.kept["sign"] = torch.where(stays.view(-1, 1, 1, 1), flipped, search.kept["sign"])
        return search.goes_on()

    @staticmethod
    def _corner(search: Search, sign: Tensor) -> Tensor:
        return search.problem.project(search.kept["centre"] + search.problem.eps * sign)


def chunks(dim: int) -> Iterator[slice]:
    """All of ``dim`` values, then halves, quarters, and so on down to single ones."""
    for level in range((dim - 1).bit_length() + 1):
        length = -(-dim // 2**level)
        for start in range(0, dim, length):
            yield slice(start, min(start + length, dim))
