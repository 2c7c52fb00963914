"""Evolution strategies against closed forms: ranks, natural gradients, and the entropy of a squashed Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_pl.functional.evolution import (
    centred_ranks,
    natural_gradient_mean,
    natural_gradient_sigma,
    natural_gradient_weights,
    tanh_gaussian_entropy,
    tanh_gaussian_entropy_gradients,
)

# Pairs at r = +-sqrt(3), 0 and 0 have the moments of N(0, 1) up to the fifth, so sums over them are exact for quadratics.
EXACT = torch.tensor([math.sqrt(3.0), 0.0, 0.0], dtype=torch.float64)


def test_ranks_by_hand() -> None:
    ranks = centred_ranks(torch.tensor([[3.0, -1.0, 7.0, 4.0, 0.0], [1.0, 1.0, 5.0, 1.0, 9.0]]))
    torch.testing.assert_close(ranks, torch.tensor([[0.0, -0.5, 0.5, 0.25, -0.25], [-0.25, -0.25, 0.25, -0.25, 0.5]]))
    assert (centred_ranks(torch.full((2, 7), 3.0)) == 0).all()
    with pytest.raises(ValueError, match="at least two values"):
        centred_ranks(torch.ones(2, 1))


def one_component(fitness: Tensor) -> Tensor:
    return torch.ones(1, len(fitness), 1, 1, dtype=fitness.dtype)


def test_natural_gradients_of_a_linear_and_a_quadratic_fitness() -> None:
    mean, sigma, slope, bend = 0.7, 0.3, 2.0, -1.5
    offset = sigma * EXACT

    def fitness(u: Tensor) -> Tensor:
        return slope * u + bend * u**2

    ahead, behind = fitness(mean + offset), fitness(mean - offset)
    both = (ahead[None], behind[None], offset[None, :, None], one_component(ahead))
    # E[f] = slope * mean + bend * (mean^2 + sigma^2)
    found = natural_gradient_mean(*both)
    torch.testing.assert_close(found.item(), sigma**2 * (slope + 2 * bend * mean))
    wide, at_mean = torch.full((1, 1, 1), sigma, dtype=torch.float64), fitness(torch.tensor([[mean]], dtype=torch.float64))
    for baseline in (at_mean, torch.zeros_like(at_mean)):  # any baseline leaves the expectation as it is
        found = natural_gradient_sigma(*both, wide, baseline)
        torch.testing.assert_close(found.item(), sigma**2 / 2 * 2 * bend * sigma)


def test_natural_gradients_in_many_dimensions_with_random_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs, sigma = 200_000, torch.tensor([[[0.1, 0.3, 0.2]]], dtype=torch.float64)
    offset = sigma * torch.randn(1, pairs, 3, generator=generator, dtype=torch.float64)
    a, b = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64)
    mean = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)

    def fitness(u: Tensor) -> Tensor:
        return (a * u + b * u**2).sum(-1)

    both = (fitness(mean + offset), fitness(mean - offset), offset, torch.ones(1, pairs, 1, 1, dtype=torch.float64))
    expected = (sigma**2 * (a + 2 * b * mean)).expand(1, 1, 3)
    torch.testing.assert_close(natural_gradient_mean(*both), expected, rtol=0.03, atol=1e-3)
    expected = sigma**2 / 2 * (2 * b * sigma)
    found = natural_gradient_sigma(*both, sigma, fitness(mean).view(1, 1))
    torch.testing.assert_close(found, expected, rtol=0.03, atol=1e-4)


def test_each_component_learns_from_its_own_pairs() -> None:
    """Two components with other slopes, per coordinate; one without pairs in the second coordinate stays."""
    sigma = 0.5
    offset = torch.full((1, 4, 2), sigma, dtype=torch.float64)
    slope = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    ahead, behind = (slope * sigma)[None], (-slope * sigma)[None]
    member = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    member[0, :2, 0, 0] = member[0, 2:, 1, 0] = member[0, :, 0, 1] = 1.0
    found = natural_gradient_mean(ahead, behind, offset, member)
    torch.testing.assert_close(found[0], sigma**2 * torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    wide = torch.full((1, 2, 2), sigma, dtype=torch.float64)
    assert (natural_gradient_sigma(ahead, behind, offset, member, wide, torch.zeros(1, 2)) == 0).all()  # r^2 = 1


def test_weights_move_to_the_better_component_and_stay_a_distribution() -> None:
    weights = torch.tensor([[0.2, 0.8]])
    found = natural_gradient_weights(torch.tensor([[2.0, 1.0]]), weights)
    torch.testing.assert_close(found, torch.tensor([[0.2 * 0.8, -0.8 * 0.2]]))


def test_entropy_against_the_density_integrated_by_hand() -> None:
    mean, sigma = torch.tensor([0.0, 0.8, -1.5], dtype=torch.float64), torch.tensor([0.1, 0.87, 0.4], dtype=torch.float64)
    u = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    for m, s in zip(mean, sigma, strict=True):
        log_u = -0.5 * ((u - m) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)
        log_v = log_u - torch.log1p(-(u.tanh() ** 2))
        by_hand = -torch.trapezoid(log_u.exp() * log_v.nan_to_num(posinf=0.0), u)
        torch.testing.assert_close(tanh_gaussian_entropy(m, s), by_hand, rtol=1e-6, atol=1e-6)


def test_entropy_gradients_against_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    sigma = (0.05 + torch.rand(4, 3, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    expected = torch.autograd.grad(tanh_gaussian_entropy(mean, sigma).sum(), (mean, sigma))
    for found, right in zip(tanh_gaussian_entropy_gradients(mean, sigma), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_entropy_is_highest_where_the_literature_says() -> None:
    sigma = torch.linspace(0.5, 1.5, 1001, dtype=torch.float64)
    entropy = tanh_gaussian_entropy(torch.zeros_like(sigma), sigma)
    assert entropy.max().item() == pytest.approx(0.683, abs=1e-3)
    assert sigma[entropy.argmax()].item() == pytest.approx(0.87, abs=0.01)
    assert tanh_gaussian_entropy(torch.tensor(0.0), torch.tensor(0.15)).item() == pytest.approx(-0.50, abs=0.01)
