"""The base of attacks that see scores only: every sample has a budget of queries, and stops at its first success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...functional.geometry import Norm
from .base import Attack
from .checks import DEFAULT_EPS, Number, choose
from .prepare import BNMode
from .problem import Problem

QueryObjective = Literal["margin", "ce"]
QUERY_OBJECTIVES: tuple[str, ...] = ("margin", "ce")
BLOCK = 32
"""Steps whose random numbers are drawn at once: a draw costs dozens of small operations, however few its numbers."""
LOOK_EVERY = 10
"""Rounds between two looks at a device that would have to wait for them."""
_SHOW_EVERY = 50  # rounds between two signs of progress


class QueryAttack(Attack):
    """An attack that asks the network for logits and never for gradients. A subclass defines ``perturb`` as a loop::

        def perturb(self, problem, x, y):
            search = Search(problem, start, self.n_queries)          # the first query is at the start
            search.kept["sign"] = torch.ones_like(x)                 # state of each sample: cut together with the samples
            while search.goes_on(queries=1):                         # here broken samples leave, and sizes change: only here
                x_new = ...search.x_best, search.problem, search.kept["sign"], search.few(3)...
                accepted = search.offer(x_new)                       # one query; the better one stays, the broken stop
                search.kept["sign"] = torch.where(accepted.view(-1, 1, 1, 1), ..., search.kept["sign"])
            return search.result()

    Every sample that stands has spent the same number of queries. They are the forward passes of :meth:`Attack.run`, which
    counts them for each sample: ``attack.run(...).forward_passes.of_each``; see :func:`query_statistics`.

    Args:
        n_queries: most forward passes that a sample may cost (in each restart), the one at the start included.
        eps: see :class:`Attack`, and so all others.
        random_start: False if the attack draws no random numbers at all.
        objective: what is maximised: ``margin`` or ``ce``.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        n_queries: int,
        norm: Norm = "linf",
        random_start: bool = True,
        restarts: int = 1,
        targeted: bool = False,
        objective: QueryObjective = "margin",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("objective", objective, QUERY_OBJECTIVES)
        if not isinstance(n_queries, int) or n_queries < 1:
            raise ValueError(f"n_queries={n_queries} must be a whole number of at least 1, such as 5000")
        super().__init__(
            eps,
            norm=norm,
            random_start=random_start,
            restarts=restarts,
            targeted=targeted,
            objective=objective,
            bn_mode=bn_mode,
            seed=seed,
        )
        self.n_queries = n_queries


class Search:
    """What a query attack knows of the samples that still stand, n of B, and what it found for the others.

    On a CPU broken samples leave at once. A GPU is asked for them only every few rounds, since it would have to wait: until
    then they are carried along, change no more, and what is passed through the network for them is not counted.

    Attributes:
        problem: of the standing samples: ``problem.x``, ``problem.y``, ``problem.eps``, ``problem.project``, ...
        ids: where these stand in the batch, int64 (n,).
        x_best: the image that was accepted last, (n, C, H, W).
        value: the objective there, (n,).
        logits: of the network at the images that were offered last, (n, K), until samples leave.
        kept: other tensors (n, ...) of an attack, which are cut together with the samples.
        spent: queries of each standing sample so far.

    Args:
        problem: of the whole batch.
        start: images inside ball and box (B, C, H, W): the first query.
        n_queries: most queries a sample may cost.
        look_every: rounds between two looks for broken samples; None: 1 on a CPU, else ``LOOK_EVERY``.
        name: what a progress bar calls it.
    """

    def __init__(
        self, problem: Problem, start: Tensor, n_queries: int, look_every: int | None = None, name: str = "queries"
    ) -> None:
        self.problem, self.n_queries, self.name = problem, n_queries, name
        self.look_every = look_every or (1 if start.device.type == "cpu" else LOOK_EVERY)
        self.ids = torch.arange(len(start), device=start.device)
        self.kept: dict[str, Tensor] = {}
        self.spent = self.rounds = 0
        self.x_best = start
        self._found = start.clone()
        self._standing = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self._unpaid = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        self._offered = False
        self._few: Counter[int] = Counter()
        self.value = torch.full((len(start),), float("-inf"), device=start.device, dtype=start.dtype)
        self.offer(start)

    def goes_on(self, queries: int = 1) -> bool:
        """Whether samples stand whose budget allows ``queries`` more. Broken samples leave here, and nowhere else."""
        if self.spent + queries > self.n_queries:
            return False
        if self.rounds % self.look_every == 0:
            self._drop()
        if self.rounds % _SHOW_EVERY == 0:
            self.problem.ledger.progress.show(self.name, len(self.ids), self.spent / self.n_queries)
        self.rounds += 1
        return len(self.ids) > 0

    def ask(self, images: Tensor) -> Tensor:
        """Objective at probes, which need not lie in the ball and are no candidates: (kn, C, H, W) -> (k, n), k queries."""
        logits = self.problem.logits(images)
        times = len(images) // len(self.ids)
        self._pay(times)
        return self.problem.objective.copies(times)(logits).view(times, -1)

    def offer(self, x_new: Tensor, accept: Callable[[Tensor, Tensor], Tensor] = torch.gt) -> Tensor:
        """Query candidates inside ball and box, (n, C, H, W), and say which are accepted, bool (n,).

        Args:
            x_new: candidates.
            accept: decides from their objective and from that of ``x_best``, both (n,): ``torch.gt``, ``torch.ge`` or
                :func:`always`. A success is always accepted.
        """
        logits = self.logits = self.problem.logits(x_new)
        self._pay(1)
        value, fooled = self.problem.objective(logits).to(self.value.dtype), self.problem.fooled(logits)
        accepted = (accept(value, self.value) | fooled) & self._standing
        self.x_best = torch.where(accepted.view(-1, 1, 1, 1), x_new, self.x_best)
        self.value = torch.where(accepted, value, self.value)
        self._standing = self._standing & ~fooled
        self._offered = True
        return accepted

    def few(self, count: int) -> Tensor:
        """``count`` numbers from U[0, 1) for each standing sample, float64 (n, count)."""
        key, place = f"few {count}", self._few[count] % BLOCK
        if place == 0:
            self.kept[key] = self.problem.draws.few(self.x_best, BLOCK * count).view(-1, BLOCK, count)
        self._few[count] += 1
        return self.kept[key][:, place]

    def result(self) -> Tensor:
        """The last accepted image of every sample of the batch, (B, C, H, W)."""
        self._drop()
        self._found[self.ids] = self.x_best
        return self._found

    def _pay(self, queries: int) -> None:
        self.spent += queries
        if self._offered:  # else nothing broke since the last look
            self._unpaid += queries * ~self._standing

    def _drop(self) -> None:
        self._offered = False
        if self._standing.all():
            return
        self.problem.ledger.forwards.add(-self._unpaid, self.problem.ids)
        self._found[self.ids] = self.x_best
        rows = self._standing.nonzero().squeeze(1)
        self.problem, self.ids = self.problem.rows(rows), self.ids[rows]
        self.x_best, self.value = self.x_best[rows], self.value[rows]
        self.kept = {name: tensor[rows] for name, tensor in self.kept.items()}
        self._standing, self._unpaid = self._standing[rows], torch.zeros_like(self._unpaid[rows])


def always(value: Tensor, best: Tensor) -> Tensor:
    """For :meth:`Search.offer`: every candidate is accepted, as on a walk that may descend."""
    return torch.ones_like(value, dtype=torch.bool)


@dataclass(frozen=True)
class QueryStatistics:
    """How a query attack did.

    Args:
        success_rate: share of the samples that were fooled.
        mean: queries of the successes on average; NaN without any.
        median: of the successes; NaN without any.
        mean_of_all: queries on average, where a failure counts as the whole budget.
    """

    success_rate: float
    mean: float
    median: float
    mean_of_all: float


def query_statistics(queries: Tensor, fooled: Tensor, n_queries: int) -> QueryStatistics:
    """Sum up queries the ways papers do.

    Args:
        queries: of each sample (B,), as in ``attack.run(...).forward_passes.of_each``.
        fooled: whether it was a success, bool (B,).
        n_queries: the budget.
    """
    queries = queries.double()
    successes = queries[fooled]
    return QueryStatistics(
        success_rate=fooled.double().mean().item(),
        mean=successes.mean().item(),
        median=successes.quantile(0.5).item() if len(successes) else float("nan"),
        mean_of_all=torch.where(fooled, queries, float(n_queries)).mean().item(),
    )
