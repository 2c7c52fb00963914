"""A search by evolution, from its beginning to a distribution: what ViewFool and GMVFool share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..attacks.checks import check_count, choose
from ..attacks.draws import seed_from
from .distribution import MIXTURES, Mixture, UniformViews, ViewDistribution
from .evolution import CENTERS, Center, Evolution, Mixtures
from .problem import ViewProblem
from .search import Order, Searched

Begin = Literal["middle", "spread", "search"]
_SCOUTS = 10


@dataclass(frozen=True)
class EvolutionSearch:
    """An :class:`Evolution` with where it begins and what it returns.

    Args:
        popsize: means of components not counted beyond one, odd: a mean and antithetic pairs.
        iterations: of the evolution.
        components: K.
        mixture: ``joint`` or ``per_dim``.
        entropy_weight: lambda.
        step_size: of the means.
        sigma_init: sigma at the beginning.
        sigma_max: largest sigma.
        begin: means at the ``middle`` of the space, or ``spread`` over (-1, 1)^D of u as a Latin hypercube; or at
            the worst of uniform views, found by ``search``, in 10 * ``popsize`` renders more: of K groups the worst of each.
        center: the found means, or the ``best`` candidates of the last iteration.
        learn_weights: move the weights of the components.

    Raises:
        ValueError: if an argument is out of its range.
    """

    popsize: int
    iterations: int
    components: int
    mixture: Mixture
    entropy_weight: float
    step_size: float
    sigma_init: float
    sigma_max: float
    begin: Begin
    center: Center
    learn_weights: bool

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("components", self.components)
        choose("mixture", self.mixture, MIXTURES)
        choose("begin", self.begin, get_args(Begin))
        choose("center", self.center, CENTERS)
        least = 2 * self.components + 1
        if not isinstance(self.popsize, int) or self.popsize % 2 == 0 or self.popsize < least:
            each = "" if self.components == 1 else f" for {self.components} components"
            raise ValueError(
                f"popsize={self.popsize} must be odd and at least {least}{each}: a mean and antithetic pairs, such as "
                f"{max(51, least)}"
            )
        if not 0 < self.sigma_init <= self.sigma_max < math.inf:
            raise ValueError(f"sigma_init={self.sigma_init} must be above 0 and at most sigma_max={self.sigma_max}")
        for field, value in (("entropy_weight", self.entropy_weight), ("step_size", self.step_size)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{field}={value} must be a finite number of at least 0")

    def run(self, problem: ViewProblem, order: Order) -> Searched:
        """Search; each iteration costs K - 1 + ``popsize`` renders of each object."""
        iterations = self.iterations if order.iterations is None else order.iterations
        check_count("iterations", iterations)
        if order.kept is None:
            state = self._begin(problem, order.start)
            order.keep({**state._asdict(), "history": torch.zeros(len(problem.ids), 0, 2)}, 0.0)
        else:
            state = Mixtures(*(order.kept[name].to(problem.device) for name in Mixtures._fields))
        evolution = Evolution((self.popsize - 1) // 2, self.entropy_weight, self.step_size, self.sigma_max, self.learn_weights)
        state, history = _evolve(evolution, state, iterations, problem, order.kept, order.keep)
        weights = state.weights if self.mixture == "per_dim" else state.weights.squeeze(2)
        mean = state.best if self.center == "best" else state.mean
        return Searched(ViewDistribution(weights, mean, state.sigma, problem.space, problem.ids, self.mixture), history)

    def _begin(self, problem: ViewProblem, start: ViewDistribution | None) -> Mixtures:
        n, dim, columns = len(problem.ids), problem.space.dim, problem.space.dim if self.mixture == "per_dim" else 1
        if start is not None:
            if start.components != self.components or start.mixture != self.mixture:
                raise ValueError(
                    f"start has components={start.components} and mixture={start.mixture!r}, and the attack {self.components} "
                    f"and {self.mixture!r}: give it those of start, or start anew"
                )
            weights = start.weights if self.mixture == "per_dim" else start.weights.unsqueeze(2)
            mean, sigma = start.mean, start.sigma.clamp(max=self.sigma_max)
        else:
            shape = (n, self.components, dim)
            weights = torch.full((n, self.components, columns), 1 / self.components, device=problem.device)
            mean = torch.zeros(shape, device=problem.device)
            if self.begin == "spread":
                order = problem.draws.uniform("begin order", self.components, dim).argsort(1)
                mean = 2 * (order + problem.draws.uniform("begin place", self.components, dim)) / self.components - 1
            elif self.begin == "search":
                mean = self._worst_uniform(problem)
            sigma = torch.full(shape, self.sigma_init, device=problem.device)
        return Mixtures(weights, mean, sigma, torch.zeros_like(mean), mean.clone())

    def _worst_uniform(self, problem: ViewProblem) -> Tensor:
        """Uniform views in K groups, the worst of each: (N, K, D)."""
        each = -(-_SCOUTS * self.popsize // self.components)
        u = UniformViews(problem.space, problem.ids).sample(each * self.components, seed_from(problem.draws.key, "scouts"))[0]
        u = u.to(problem.device)
        place = problem.fitness(u).view(len(u), self.components, each).argmax(2)
        first = each * torch.arange(self.components, device=problem.device)
        return u.gather(1, (first + place).unsqueeze(2).expand(-1, -1, u.shape[2]))


def _evolve(
    evolution: Evolution,
    state: Mixtures,
    iterations: int,
    problem: ViewProblem,
    kept: Mapping[str, Tensor] | None,
    keep: Callable[[dict[str, Tensor], float], None],
) -> tuple[Mixtures, Tensor]:
    """The last state, and mean and largest fitness of each iteration (N, iterations, 2)."""
    history: list[Tensor] = []
    if kept is not None:
        history = list(kept["history"].to(problem.device).unbind(1))
    for iteration in range(len(history), iterations):
        asked = evolution.ask(state, iteration, problem.draws)
        fitness = problem.fitness(asked.u)
        state = evolution.tell(state, iteration, asked, fitness)
        history.append(torch.stack([fitness.mean(1), fitness.amax(1)], 1))
        keep({**state._asdict(), "history": torch.stack(history, 1)}, (iteration + 1) / iterations)
    return state, torch.stack(history, 1)
