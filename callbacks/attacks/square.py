"""Square: random search over squares."""

from __future__ import annotations

from torch import Tensor

from ...functional.geometry import Norm
from .checks import DEFAULT_EPS, Number
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, QueryObjective, Search
from .squares import SquareProposal


class Square(QueryAttack):
    """Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049; under l1 Croce and Hein 2021, arXiv 2103.01208).

    A random search that needs the logits alone. linf: the perturbation of a square becomes eps or -eps in each channel.
    l2, l1: it moves from one square window to another. What raises the margin stays, and the windows shrink. The schedule,
    the patterns and ``p_init`` are those of AutoAttack; the paper takes ``p_init=0.05`` for linf and 0.1 for l2 (from
    memory). Here windows, signs and patterns are drawn for each sample, as in the paper, where AutoAttack's code shares them
    in a batch. A tie of two logits counts as a success only if the prediction differs.

    Cost: up to ``n_queries`` forward passes a sample, the start included, and none after its first success; each restart as
    many for the samples that stand, and one to judge it. No backward pass.

    Args:
        n_queries: most queries of a sample, at least 1.
        p_init: share of the image that the first window covers, in (0, 1].
        rescale_schedule: shrink the windows as fast as suits ``n_queries`` instead of 10000.
        reach_border: let windows also lie at the last row and column, which breaks a few samples more. AutoAttack's code
            leaves those as they started, so its figures are those of False.
        eps: see :class:`Attack`, and so all others.
        objective: what has to rise: ``margin``, or ``ce`` as the paper does for targets.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        n_queries: int = 5000,
        p_init: float = 0.8,
        restarts: int = 1,
        rescale_schedule: bool = False,
        reach_border: bool = False,
        targeted: bool = False,
        objective: QueryObjective = "margin",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init={p_init} must lie in (0, 1]: it is the share of the image that the first window covers")
        super().__init__(
            eps,
            n_queries=n_queries,
            norm=norm,
            restarts=restarts,
            targeted=targeted,
            objective=objective,
            bn_mode=bn_mode,
            seed=seed,
        )
        self.p_init, self.rescale_schedule, self.reach_border = p_init, rescale_schedule, reach_border

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        rescale_to = self.n_queries if self.rescale_schedule else None
        propose = SquareProposal(self.norm, self.p_init, rescale_to, reach_border=self.reach_border)
        numbers = propose.numbers(x)
        search = Search(problem, propose.start(x, problem.eps, problem.draws), self.n_queries, name=self.name or "square")
        for iteration in range(self.n_queries):
            if not search.goes_on():
                break
            part = search.problem
            search.offer(propose(search.x_best, part.x, part.eps, iteration, search.few(numbers)))
        return search.result()
