"""The evolution strategy of ViewFool and GMVFool, for many objects at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...functional.evolution import (
    centred_ranks,
    natural_gradient_mean,
    natural_gradient_sigma,
    natural_gradient_weights,
    tanh_gaussian_entropy,
    tanh_gaussian_entropy_gradients,
)
from .draws import ObjectDraws

Center = Literal["mean", "best"]
CENTERS: tuple[str, ...] = get_args(Center)


class Mixtures(NamedTuple):
    """Where the search stands: N mixtures of K Gaussians in D coordinates.

    Args:
        weights: (N, K, 1), or (N, K, D) where each coordinate has its own.
        mean: (N, K, D).
        sigma: (N, K, D).
        velocity: momentum of the means, (N, K, D).
        best: of each component's candidates in the last iteration the one with the highest fitness, (N, K, D); where each
            coordinate has its own component, the coordinate of it.
    """

    weights: Tensor
    mean: Tensor
    sigma: Tensor
    velocity: Tensor
    best: Tensor


class Population(NamedTuple):
    """Candidates of one iteration.

    Args:
        u: K means, J points ahead and J behind, (N, K + 2 J, D).
        offset: (N, J, D).
        member: which component each pair belongs to, 0 or 1, (N, J, K, 1 or D).
    """

    u: Tensor
    offset: Tensor
    member: Tensor


@dataclass(frozen=True)
class Evolution:
    """PEPG (Sehnke et al. 2010) on ranks, with the entropy of ViewFool (Dong et al. 2022, arXiv 2210.03895).

    With F the centred ranks of an object's candidates, e a pair's offset, b_k the rank of a component's mean, n_k its number of
    pairs and H the entropy of tanh(mean + sigma r):

    - mean: g = sum_pairs (F+ - F-) e / w_k + entropy_weight * w_k * dH/dmean; velocity = 0.9 velocity + 0.1 g; mean +=
      step_size * 0.99^t * velocity.
    - sigma: d = w_k * sum_pairs ((F+ + F-) / 2 - b_k) (e^2 - sigma^2) / sigma / (2 n_k) + entropy_weight * w_k * dH/dsigma;
      sigma += 0.2 d, by at most a fifth of sigma, at most ``sigma_max``, times 0.999 while above 0.01.
    - weights, where they are learned: w_k += 0.02 * w_k (value_k - sum_l w_l value_l), by at most a fifth, made to sum to 1,
      with value_k the mean rank of a component's pairs plus entropy_weight * (H_k - log w_k). [Reconstructed: the natural
      gradient in place of an update whose code is off by default.]

    The sums are natural gradients, see :mod:`robust_pl.functional.evolution`. The entropy's gradients are exact instead of
    means over the population, and equal fitness gets equal ranks. H of a mixture is the bound sum_k w_k (H_k - log w_k) of the
    authors' code, in which components do not know that they overlap.

    Args:
        pairs: J, antithetic pairs an iteration.
        entropy_weight: lambda.
        step_size: of the mean.
        sigma_max: largest sigma.
        learn_weights: move the weights, too.
    """

    pairs: int
    entropy_weight: float
    step_size: float
    sigma_max: float
    learn_weights: bool

    def ask(self, state: Mixtures, iteration: int, draws: ObjectDraws) -> Population:
        """Candidates of an iteration; components are drawn stratified, each its share of pairs to within one."""
        components, dim = state.mean.shape[1:]
        chosen = draws.components(f"components {iteration}", state.weights, self.pairs)  # (N, J, 1 or D)
        wide = chosen.expand(-1, -1, dim)
        offset = state.sigma.gather(1, wide) * draws.normal(f"noise {iteration}", self.pairs, dim)
        middle = state.mean.gather(1, wide)
        member = (chosen.unsqueeze(2) == torch.arange(components, device=chosen.device).view(-1, 1)).to(offset.dtype)
        return Population(torch.cat([state.mean, middle + offset, middle - offset], 1), offset, member)

    def tell(self, state: Mixtures, iteration: int, asked: Population, fitness: Tensor) -> Mixtures:
        """The next state, after the candidates' fitness (N, K + 2 J)."""
        ranks = centred_ranks(fitness)
        of_mean, ahead, behind = ranks.split([state.mean.shape[1], self.pairs, self.pairs], 1)
        weights, sigma, offset, member = state.weights, state.sigma, asked.offset, asked.member
        count, present = member.sum(1), weights.clamp_min(1e-6)
        by_mean, by_sigma = tanh_gaussian_entropy_gradients(state.mean, sigma)
        uphill = 2 * count / present * natural_gradient_mean(ahead, behind, offset, member)
        velocity = 0.9 * state.velocity + 0.1 * (uphill + self.entropy_weight * weights * by_mean)
        mean = state.mean + self.step_size * 0.99**iteration * velocity
        widen = weights * natural_gradient_sigma(ahead, behind, offset, member, sigma, of_mean)
        change = (0.2 * (widen + self.entropy_weight * weights * by_sigma)).clamp(-0.2 * sigma, 0.2 * sigma)
        wider = (sigma + change).clamp(max=self.sigma_max)
        wider = torch.where(wider > 0.01, 0.999 * wider, wider)
        if self.learn_weights:
            weights = self._move_weights(state, member, (ahead + behind) / 2, count)
        return Mixtures(weights, mean, wider, velocity, _best(asked, ranks))

    def _move_weights(self, state: Mixtures, member: Tensor, height: Tensor, count: Tensor) -> Tensor:
        weights = state.weights
        # A component without a pair is worth what the others are worth.
        worth = (member * height.unsqueeze(-1).unsqueeze(-1)).sum(1) / count.clamp_min(1.0)
        usual = (worth * count).sum(1, keepdim=True) / count.sum(1, keepdim=True)
        spread = tanh_gaussian_entropy(state.mean, state.sigma)
        if weights.shape[2] == 1:
            spread = spread.sum(2, keepdim=True)
        value = torch.where(count > 0, worth, usual) + self.entropy_weight * (spread - weights.clamp_min(1e-6).log())
        change = (0.02 * natural_gradient_weights(value, weights)).clamp(-0.2 * weights, 0.2 * weights)
        return (weights + change) / (weights + change).sum(1, keepdim=True)


def _best(asked: Population, ranks: Tensor) -> Tensor:
    """Of each component's mean and pairs the candidate of the highest rank, (N, K, D)."""
    components, dim = asked.member.shape[2], asked.u.shape[2]
    own = torch.eye(components, device=ranks.device).view(1, components, components, 1)
    own = own.expand(len(ranks), -1, -1, asked.member.shape[3])
    member = torch.cat([own, asked.member, asked.member], 1) > 0  # (N, P, K, 1 or D)
    place = ranks.view(*ranks.shape, 1, 1).masked_fill(~member, -torch.inf).argmax(1)
    return asked.u.gather(1, place.expand(-1, -1, dim))
