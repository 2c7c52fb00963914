"""GMVFool: a mixture of Gaussians of viewpoints, for several regions in which a classifier fails."""

from __future__ import annotations

from ...scenes.view_space import ViewSpace
from .base import ViewpointAttack
from .distribution import Mixture
from .evolution import Center
from .evolve import Begin, EvolutionSearch
from .problem import ViewProblem
from .search import Order, Searched


class GMVFool(ViewpointAttack):
    """GMVFool (Ruan et al. 2023, arXiv 2307.10235): :class:`ViewFool` with a mixture of K Gaussians, u ~ sum_k w_k N(mean_k,
    diag(sigma_k^2)).

    All components share the ranks of one population, and each learns from its own pairs, see
    :class:`robust_pl.callbacks.viewpoints.evolution.Evolution`. As ``joint`` mixture, that of the equations, a view comes from
    one component. As ``per_dim``, that of the authors' code, each coordinate of it chooses its own component. The code draws
    components independently, so that some get no pair; here each gets its share. It returns best candidates instead of means,
    ``center="best"``, of each component the best one; and it begins in the middle, where only noise parts the components, or in
    independent U(-1, 1), which may leave a half of the space empty.

    Cost: ``components`` - 1 + ``popsize`` renders and forward passes an iteration for each object, 5,250 in all; and
    ``eval_samples`` + ``components``.

    Args:
        components: K; the authors attack with 5 and train with 15.
        mixture: ``joint`` or ``per_dim``.
        popsize: one mean and antithetic pairs of an iteration, odd, at least one pair for each component.
        iterations: of the evolution; the authors take 10 where a training starts from what it found before.
        entropy_weight: lambda.
        learn_weights: move the weights of the components, which else stay equal, as by default in the authors' code.
        step_size: of the means; 0.99 times that each iteration.
        sigma_init: standard deviation of u at the beginning.
        sigma_max: the largest.
        begin: means ``spread`` at random over (-1, 1) of u, in each coordinate one in each K-th part of it; all in the
            ``middle`` of the space; or where ``search`` found the worst of K groups of uniform views, in 10 * ``popsize``
            renders more.
        center: ``mean`` or ``best``, see above.
        space: see :class:`ViewpointAttack`, and so all others.
    """

    def __init__(
        self,
        components: int = 5,
        mixture: Mixture = "joint",
        popsize: int = 101,
        iterations: int = 50,
        entropy_weight: float = 0.05,
        learn_weights: bool = False,
        step_size: float = 0.1,
        sigma_init: float = 0.1,
        sigma_max: float = 0.15,
        begin: Begin = "spread",
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
        self.components, self.mixture, self.popsize, self.iterations = components, mixture, popsize, iterations
        self.entropy_weight, self.learn_weights, self.step_size = entropy_weight, learn_weights, step_size
        self.sigma_init, self.sigma_max, self.begin, self.center = sigma_init, sigma_max, begin, center
        self._search()

    def search(self, problem: ViewProblem, order: Order) -> Searched:
        return self._search().run(problem, order)

    def _search(self) -> EvolutionSearch:
        return EvolutionSearch(
            self.popsize,
            self.iterations,
            self.components,
            self.mixture,
            entropy_weight=self.entropy_weight,
            step_size=self.step_size,
            sigma_init=self.sigma_init,
            sigma_max=self.sigma_max,
            begin=self.begin,
            center=self.center,
            learn_weights=self.learn_weights,
        )
