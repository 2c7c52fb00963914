"""QueryNet: small networks learn from the queries, propose the next ones and vote on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...functional.geometry import Norm
from ...functional.losses import cross_entropy
from .checks import DEFAULT_EPS, Number, check_count, choose
from .draws import seed_from
from .memory import Memory
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, Search, always
from .squares import SquareProposal
from .surrogates import Surrogates

REDRAWS = 50
LATEST = 16
"""Queries of a sample that a proposal of Square+ is compared with."""
PROMISING = 0.7


class QueryNet(QueryAttack):
    """QueryNet (Chen et al. 2021, arXiv 2105.15010): surrogates learn from the answers, propose queries and vote on them.

    The first query is at x, the second at the stripes of Square. Then, for each query of a sample: the surrogates are fitted
    to the logits of all queries so far; each proposes one step of 2 * eps along its gradient, and Square+ a window that, by an
    estimate of the Lipschitz constant, may still beat the best; the proposal with the largest margin in the surrogates'
    weighted vote is queried. The weight of a proposer is the share of its queries that raised the margin, 0 for fewer than
    ``min_picks``. Once Square+ is the best of them it stands against Square, and once Square is best that goes on alone. The
    surrogates' own passes are no queries, and are not counted.

    Samples of a batch share the surrogates, so the outcome for a sample depends on its batch, and large batches need fewer
    queries. Published: CIFAR-10, WRN-28-10, eps=16/255, one batch of 9597: 16.0 queries on average, where Square takes 53.1.
    Once fewer samples stand than a few times ``min_picks``, no proposer has a weight, and Square+ goes on alone: in a batch of
    128 images of CIFAR-10 that is soon, and the gain over Square is small.

    Departures from the public code. The architecture search is left out: the surrogates are plain CNNs of different depths.
    They minimise the squared error with Adam, and stop early by the share of the logits' variance that is left instead of by
    its value on CIFAR-10, so that the scale of the logits does not matter; both are choices of ours. They are fitted one
    after the other. The memory is a ring, and Square+ looks at the 16 latest queries of a sample. Windows are drawn for each
    sample instead of once in a batch. The clean images that are misclassified, which stop at their first query, teach too.

    Cost: up to ``n_queries`` forward passes a sample, none after its first success, no backward pass. The surrogates train
    ``n_surrogates * first_steps`` batches at first, and up to ``n_surrogates * fit_steps`` before each later query.

    Args:
        eps: see :class:`Attack`, and so all others. Published: 16/255 and, under l2, 3 on CIFAR-10.
        norm: ``linf`` or ``l2``.
        n_queries: most queries of a sample, at least 1.
        p_init: share of the image that the first window covers, in (0, 1].
        rescale_schedule: shrink the windows as fast as suits ``n_queries`` instead of 10000, as the public code does.
        n_surrogates: how many.
        width: channels of their first layer.
        first_steps: most batches that each is trained on at first.
        fit_steps: most batches before each later query.
        batch_size: of their training.
        memory: queries that are kept, images and logits: 12 kB each on CIFAR-10.
        min_picks: queries that a proposer needs in a round to get a weight. Public code: 20 on ImageNet, 2 on MNIST.

    Raises:
        ValueError: if an argument is out of its range.
    """

    per_sample = False

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        n_queries: int = 10000,
        p_init: float = 0.05,
        rescale_schedule: bool = False,
        n_surrogates: int = 3,
        width: int = 16,
        first_steps: int = 1500,
        fit_steps: int = 100,
        batch_size: int = 128,
        memory: int = 16384,
        min_picks: int = 10,
        targeted: bool = False,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("norm", norm, ("linf", "l2"))
        super().__init__(eps, n_queries=n_queries, norm=norm, targeted=targeted, bn_mode=bn_mode, seed=seed)
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init={p_init} must lie in (0, 1]: it is the share of the image that the first window covers")
        self.n_surrogates, self.width, self.memory = n_surrogates, width, memory
        self.first_steps, self.fit_steps, self.batch_size = first_steps, fit_steps, batch_size
        self.p_init, self.rescale_schedule, self.min_picks = p_init, rescale_schedule, min_picks
        for field in ("n_surrogates", "width", "first_steps", "fit_steps", "batch_size", "memory", "min_picks"):
            check_count(field, getattr(self, field))

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        # Fitting needs the answers of each round, so a GPU has to wait anyway.
        search = Search(problem, x, self.n_queries, look_every=1)
        team = Team(self, search)
        if search.goes_on():
            part = search.problem
            team.query(team.squares.start(part.x, part.eps, part.draws), accept=always)
        for iteration in range(self.n_queries):
            if not search.goes_on():
                break
            team.query(*team.choose(iteration))
        return search.result()


class Team:
    """The proposers of one call, numbered: the surrogates, Square+, Square; and what they learned.

    Args:
        attack: whose arguments they follow.
        search: at its first query.
    """

    def __init__(self, attack: QueryNet, search: Search) -> None:
        self.attack, self.search = attack, search
        self.squares = SquareProposal(attack.norm, attack.p_init, attack.n_queries if attack.rescale_schedule else None)
        self.square_plus, self.square = attack.n_surrogates, attack.n_surrogates + 1
        self.weights = [1.0] * attack.n_surrogates + [0.0, 0.0]
        self.surrogates: Surrogates | None = None
        samples = len(search.ids)
        self.memory = Memory(min(attack.memory, samples * attack.n_queries), samples, LATEST, search.x_best, search.logits)
        search.kept["lipschitz"] = torch.zeros_like(search.value)
        self._remember(search.x_best)

    def query(self, x_new: Tensor, picks: Tensor | None = None, accept: Callable[[Tensor, Tensor], Tensor] = torch.gt) -> None:
        """Pay for the images ``x_new`` (n, C, H, W), of the proposers ``picks`` (n,), and learn from the answers."""
        accepted = self.search.offer(x_new, accept)
        proposers = self._proposers()
        if len(proposers) > 1:
            self._remember(x_new)
        if len(proposers) > 1 and picks is not None:
            counts = torch.stack([torch.stack([picks == a, (picks == a) & accepted]).sum(1) for a in proposers]).tolist()
            for proposer, (picked, raised) in zip(proposers, counts, strict=True):
                self.weights[proposer] = raised / picked if picked >= self.attack.min_picks else 0.0

    def choose(self, iteration: int) -> tuple[Tensor, Tensor]:
        """The image to query for each sample (n, C, H, W), and who proposed it (n,)."""
        proposers = self._proposers()
        images = self._along_gradients() if 0 in proposers else []
        if self.square_plus in proposers:
            images.append(self._promising_windows(iteration))
        if self.square in proposers:
            images.append(self._windows(self.search.x_best, iteration))
        if len(images) == 1:
            best = torch.zeros_like(self.search.ids)
        else:
            best = torch.stack([self._votes(image) for image in images]).argmax(0)
        return torch.stack(images)[best, torch.arange(len(best), device=best.device)], best + proposers[0]

    def _proposers(self) -> range:
        """Who proposes in this round. A tie goes to Square+, then to Square."""
        highest = max(self.weights)
        if self.weights[self.square_plus] == highest:
            return range(self.square_plus, self.square + 1)
        if self.weights[self.square] == highest:
            return range(self.square, self.square + 1)
        return range(self.square_plus + 1)

    def _remember(self, images: Tensor) -> None:
        search = self.search
        value = search.problem.objective(search.logits).to(search.value.dtype)
        search.kept["last"], search.kept["last value"] = images, value
        self.memory.add(search.ids, images, search.logits, value)

    def _along_gradients(self) -> list[Tensor]:
        """From each surrogate, once it is fitted, the longest step that the ball allows."""
        attack, x_best, part = self.attack, self.search.x_best, self.search.problem
        steps = attack.fit_steps if self.surrogates else attack.first_steps
        if self.surrogates is None:
            self.surrogates = Surrogates(attack.n_surrogates, attack.width, self.memory, seed_from(attack.seed, "surrogates"))
        self.surrogates.fit(self.memory, steps, attack.batch_size)
        sign = -1 if part.targeted else 1
        gradients = self.surrogates.gradients(x_best, lambda logits: sign * cross_entropy(logits, part.y))
        return [part.project(x_best + 2 * part.eps * part.steepest(gradient.to(x_best.dtype))) for gradient in gradients]

    def _votes(self, images: Tensor) -> Tensor:
        """Weighted sum of the margins that the surrogates expect, (n,)."""
        answers = self.surrogates.logits(images)
        return sum(
            weight * self.search.problem.objective(logits) for weight, logits in zip(self.weights, answers, strict=False)
        )

    def _windows(self, x_best: Tensor, iteration: int) -> Tensor:
        part = self.search.problem
        return self.squares(x_best, part.x, part.eps, iteration, self.search.few(self.squares.numbers(part.x)))

    def _promising_windows(self, iteration: int) -> Tensor:
        """Square+: windows on top of each other until none of the answers rules out that the image is close to the best."""
        kept = self.search.kept
        images, values, there = self.memory.of(self.search.ids)
        slopes = (values - kept["last value"].unsqueeze(1)).abs() / _distances(images, kept["last"])
        slopes = torch.where(there & slopes.isfinite(), slopes, 0).amax(1)
        kept["lipschitz"] = torch.maximum(kept["lipschitz"], slopes.to(self.search.value.dtype))
        steepness, known = kept["lipschitz"].unsqueeze(1), values.masked_fill(~there, float("-inf"))
        bar = PROMISING * torch.maximum(known.amax(1), self.search.value).unsqueeze(1)
        x_new, promising = self.search.x_best, torch.zeros_like(there[:, 0])
        for _ in range(REDRAWS):
            x_new = torch.where(promising.view(-1, 1, 1, 1), x_new, self._windows(x_new, iteration))
            promising = (~there | (values + steepness * _distances(images, x_new) >= bar)).all(1)
            if promising.all():
                break
        return x_new


def _distances(images: Tensor, x: Tensor) -> Tensor:
    """Between each of (n, k, C, H, W) and its sample's (n, C, H, W) in l2, (n, k)."""
    points, x = images.flatten(2), x.to(images.dtype).flatten(1).unsqueeze(1)
    return torch.cdist(points, x, compute_mode="donot_use_mm_for_euclid_dist").squeeze(2)
