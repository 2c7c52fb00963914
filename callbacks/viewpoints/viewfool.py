"""ViewFool: one wide Gaussian of viewpoints under which a classifier fails."""

from __future__ import annotations

from ...scenes.view_space import ViewSpace
from .base import ViewpointAttack
from .evolution import Center
from .evolve import Begin, EvolutionSearch
from .problem import ViewProblem
from .search import Order, Searched


class ViewFool(ViewpointAttack):
    """ViewFool (Dong et al. 2022, arXiv 2210.03895): max over mean, sigma of E[CE(f(R(v)), y)] + lambda * H(p(v)).

    v = a * tanh(u) + b with u ~ N(mean, diag(sigma^2)); R renders, and H keeps the distribution wide, so that it outlasts small
    errors of pose and of the renderer. Found by an evolution strategy on ranks of the loss, see
    :class:`robust_pl.callbacks.viewpoints.evolution.Evolution`; since ranks are bounded, so is what ``entropy_weight`` must
    outweigh.

    The authors' code returns the mean plus the best offset of the last iteration, ``center="best"``; the mean, which is what
    the strategy has learned and what the paper says, is the default. Sigma starts at 0.1 and is cut at 0.15, as in their code:
    a coordinate's entropy in units of half its range stays below -0.50, where the uniform distribution has 0.69. At their
    ``entropy_weight`` the entropy's push, about ``entropy_weight`` / sigma, outweighs the ranks', so that sigma climbs to
    ``sigma_max`` whatever the object.

    Cost: ``popsize`` renders and forward passes an iteration for each object, 5,100 in all; and ``eval_samples`` + 1.

    Args:
        popsize: candidates an iteration, odd: the mean and antithetic pairs.
        iterations: of the evolution.
        entropy_weight: lambda; 0.01 in the paper, 0.0001 by default in its code.
        step_size: of the mean; 0.99 times that each iteration.
        sigma_init: standard deviation of u at the beginning.
        sigma_max: the largest.
        begin: the mean begins in the ``middle`` of the space, as published; ``spread`` at random in (-1, 1) of u; or where
            ``search`` found the worst of 10 * ``popsize`` uniform views, which costs as many renders more. The evolution is
            local: where much of the space fails, random search with the same renders may find worse views than it does from
            the middle.
        center: ``mean`` or ``best``, see above.
        space: see :class:`ViewpointAttack`, and so all others.
    """

    def __init__(
        self,
        popsize: int = 51,
        iterations: int = 100,
        entropy_weight: float = 0.01,
        step_size: float = 0.1,
        sigma_init: float = 0.1,
        sigma_max: float = 0.15,
        begin: Begin = "middle",
        center: Center = "mean",
        *,
        space: ViewSpace | None = None,
        eval_samples: int = 100,
        batch_size: int = 256,
        chunk: int = 16,
        targeted: bool = False,
        seed: int = 0,
        name: str | None = None,
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        super().__init__(
            space=space,
            eval_samples=eval_samples,
            batch_size=batch_size,
            chunk=chunk,
            targeted=targeted,
            seed=seed,
            name=name,
            every_n_epochs=every_n_epochs,
            folder=folder,
        )
        self.popsize, self.iterations, self.entropy_weight, self.step_size = popsize, iterations, entropy_weight, step_size
        self.sigma_init, self.sigma_max, self.begin, self.center = sigma_init, sigma_max, begin, center
        self._search()

    def search(self, problem: ViewProblem, order: Order) -> Searched:
        return self._search().run(problem, order)

    def _search(self) -> EvolutionSearch:
        return EvolutionSearch(
            self.popsize,
            self.iterations,
            components=1,
            mixture="joint",
            entropy_weight=self.entropy_weight,
            step_size=self.step_size,
            sigma_init=self.sigma_init,
            sigma_max=self.sigma_max,
            begin=self.begin,
            center=self.center,
            learn_weights=False,
        )
