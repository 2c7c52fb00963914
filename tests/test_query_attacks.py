"""Attacks that see scores only: budgets, counts, and the estimates of NES and Bandits by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from robust_pl.callbacks import NES, Bandits, Square
from robust_pl.callbacks.attacks import bandits, nes, square
from robust_pl.callbacks.attacks.draws import SampleDraws
from robust_pl.callbacks.attacks.problem import Objective, Problem
from robust_pl.callbacks.attacks.query import Search, query_statistics
from robust_pl.functional import losses

ATTACKS = [
    ("square", partial(Square, 0.1)),
    ("square_l2", partial(Square, 1.0, norm="l2")),
    ("square_l1", partial(Square, 6.0, norm="l1")),
    ("nes", partial(NES, 0.1, directions=3, sigma=0.2)),
    ("nes_l2", partial(NES, 1.0, directions=3, sigma=0.2, norm="l2")),
    ("bandits", partial(Bandits, 0.1, prior_size=4, fd_eta=0.5)),
    ("bandits_l2", partial(Bandits, 1.0, prior_size=None, fd_eta=0.5, norm="l2")),
]
every_attack = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in ATTACKS])
# Queries of one iteration.
CYCLE = {Square: 1, NES: 7, Bandits: 3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Logits(nn.Module):
    """A function of pixels as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def toy():
    """Images (1, 8, 8), a network of one hidden layer, its labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 8, 8, generator=generator)
    first, second = torch.randn(64, 32, generator=generator) / 8, torch.randn(32, 4, generator=generator) / 5
    net = Logits(lambda x: ((x.flatten(1) - 0.5) @ first * 6).relu() @ second)
    return net, x, net(x).argmax(1)


def attacked(attack, net, x, y):
    """Which samples are fooled, bool (B,), queries (B,), and images."""
    found = attack.run(net, x, y, index=torch.arange(len(x)))
    assert found.backwards == 0
    return net(found.x_adv).argmax(1) != y, found.forward_passes.of_each, found.x_adv


# Budgets and counts -----------------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("n_queries", [1, 2, 37])
def test_a_network_that_is_never_fooled_costs_the_budget(make, n_queries, toy):
    _, x, _ = toy
    net = Logits(lambda x: torch.tensor([0.0, 2.0, 1.0]) + x.mean((1, 2, 3)).unsqueeze(1))
    attack = make(n_queries=n_queries)
    _, queries, _ = attacked(attack, net, x, torch.ones(len(x), dtype=torch.int64))
    cycle = CYCLE[type(attack)]
    assert queries.unique().tolist() == [1 + (n_queries - 1) // cycle * cycle]


@every_attack
def test_a_network_that_is_fooled_at_once_costs_one_query(make, toy):
    _, x, _ = toy
    net = Logits(lambda x: torch.tensor([0.0, 2.0, 1.0]) + x.mean((1, 2, 3)).unsqueeze(1))
    fooled, queries, _ = attacked(make(n_queries=50), net, x, torch.zeros(len(x), dtype=torch.int64))
    assert fooled.all()
    assert queries.tolist() == [1] * len(x)


@every_attack
def test_samples_stop_at_their_first_success(make, toy):
    """The image that was found is that of the last query but for those that failed."""
    net, x, y = toy
    fooled, queries, x_adv = attacked(make(n_queries=120), net, x, y)
    assert fooled.float().mean() > 0.2
    assert (queries[fooled] < 120).any() and queries.max() <= 120
    for i in fooled.nonzero().squeeze(1)[:5].tolist():
        shorter = make(n_queries=int(queries[i]))
        alone = shorter.run(net, x[i : i + 1], y[i : i + 1], index=torch.tensor([i]))
        assert alone.forwards == queries[i]
        torch.testing.assert_close(alone.x_adv[0], x_adv[i], atol=1e-5, rtol=0)
        if queries[i] > 1:  # and one query less does not do
            before = make(n_queries=int(queries[i]) - 1).run(net, x[i : i + 1], y[i : i + 1], index=torch.tensor([i]))
            assert net(before.x_adv).argmax(1) == y[i]


@every_attack
def test_more_queries_lose_no_success(make, toy):
    net, x, y = toy
    before, spent = attacked(make(n_queries=1), net, x, y)[:2]
    for n_queries in (20, 60, 150):
        fooled, queries, _ = attacked(make(n_queries=n_queries), net, x, y)
        assert (fooled | ~before).all()
        assert torch.equal(queries[before], spent[before])
        before, spent = fooled, queries
    assert before.sum() > 10


@every_attack
def test_a_larger_ball_fools_no_fewer(make, toy):
    net, x, y = toy
    eps = make().eps
    fooled = []
    for part in (0.0, 0.25, 0.5, 1.0, 2.0):
        attack = make(n_queries=100)
        fooled.append((net(attack(net, x, y, eps=eps * part)).argmax(1) != y).sum().item())
    assert fooled == sorted(fooled)
    assert fooled[0] == 0 and fooled[-1] > 0.7 * len(x)


@every_attack
def test_no_gradient_is_needed(make, toy):
    """A network that rounds its pixels and has no graph."""
    net, x, _ = toy
    rounding = Logits(lambda x: net((x.detach() * 255).round() / 255).detach())
    fooled = attacked(make(n_queries=150), rounding, x, rounding(x).argmax(1))[0]
    assert fooled.float().mean() > 0.4


@every_attack
def test_a_device_that_is_seldom_asked_finds_and_counts_the_same(make, toy, monkeypatch):
    net, x, y = toy
    expected = attacked(make(n_queries=100), net, x, y)
    for module in (square, nes, bandits):
        monkeypatch.setattr(module, "Search", partial(Search, look_every=7))
    for found, wanted in zip(attacked(make(n_queries=100), net, x, y), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_tie_is_no_success_while_the_prediction_is_right():
    x = torch.rand(3, 1, 8, 8)
    net = Logits(lambda x: torch.tensor([1.0, 1.0, 0.0]).repeat(len(x), 1))
    assert attacked(Square(0.1, n_queries=9), net, x, torch.zeros(3, dtype=torch.int64))[1].tolist() == [9, 9, 9]
    assert attacked(Square(0.1, n_queries=9), net, x, torch.ones(3, dtype=torch.int64))[1].tolist() == [1, 1, 1]


def test_restarts_go_on_where_samples_stand(toy):
    net, x, y = toy
    once, spent, _ = attacked(Square(0.05, n_queries=20), net, x, y)
    twice, queries, _ = attacked(Square(0.05, n_queries=20, restarts=2), net, x, y)
    assert (twice | ~once).all() and twice.sum() > once.sum()
    assert torch.equal(queries[once], spent[once] + 1)  # one to judge the first try
    assert queries[~twice].unique().tolist() == [42]


def test_query_statistics_by_hand():
    found = query_statistics(torch.tensor([3, 10, 5, 100]), torch.tensor([True, True, True, False]), n_queries=100)
    assert (found.success_rate, found.mean, found.median, found.mean_of_all) == (0.75, 6.0, 5.0, 29.5)
    none = query_statistics(torch.tensor([7, 7]), torch.tensor([False, False]), n_queries=8)
    assert none.mean != none.mean and none.median != none.median
    assert (none.success_rate, none.mean_of_all) == (0.0, 8.0)
    even = query_statistics(torch.tensor([1, 2, 3, 10]), torch.ones(4, dtype=torch.bool), n_queries=100)
    assert even.median == 2.5


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(Square, n_queries=0), "n_queries=0"),
        (partial(Square, n_queries=1.5), "n_queries=1.5"),
        (partial(Square, p_init=0.0), "p_init=0.0"),
        (partial(Square, objective="kl"), "objective='kl'"),
        (partial(NES, directions=0), "directions=0"),
        (partial(NES, sigma=0), "sigma=0"),
        (partial(NES, norm="l1"), "norm='l1'"),
        (partial(Bandits, norm="l1"), "norm='l1'"),
        (partial(Bandits, prior_size=0), "prior_size=0"),
        (partial(Bandits, exploration=0), "exploration=0"),
        (partial(Bandits, step_size=-1.0), "step_size=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_a_prior_finer_than_the_images_is_refused(toy):
    with pytest.raises(ValueError, match="prior_size=20 is larger than the 8x8 images"):
        Bandits()(*toy)


# NES and Bandits --------------------------------------------------------------------------------------------------


def linear_problem(weight, x, norm="l2"):
    """Margin of the second logit over the first, which rises with weight (C, H, W)."""
    net = Logits(lambda x: torch.stack([torch.zeros(len(x), dtype=x.dtype), (x * weight).flatten(1).sum(1) - 50], 1))
    y = torch.zeros(len(x), dtype=torch.int64)
    draws = SampleDraws((0,), torch.arange(len(x)))
    objective = Objective(losses.margin, (y,))
    return Problem(net, x, y, eps=0.1, norm=norm, objective=objective, draws=draws, dtype=x.dtype)


def test_nes_estimates_by_hand():
    """On a linear network the sum over u of 2 * sigma * (w . u) u, exactly."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    x = x.expand(3, 1, 4, 4).clone()
    search = Search(linear_problem(weight, x), x, 100)
    found = NES(directions=2, sigma=0.25).estimate(search)
    draws = SampleDraws((0,), torch.arange(3))
    u = torch.stack([draws.normal(x), draws.normal(x)]) / 4  # the root of 16 pixels
    along = (u * weight).sum((2, 3, 4), keepdim=True)
    torch.testing.assert_close(found, (0.5 * along * u).sum(0))
    assert search.spent == 5

    many = NES(directions=300, sigma=0.25).estimate(Search(linear_problem(weight, x), x, 1000))
    assert torch.cosine_similarity(many.flatten(1), weight.flatten()[None]).min() > 0.9


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bandits_learn_by_hand(norm):
    """From p = 0 the probes are x + fd_eta * u / |u| and x - fd_eta * u / |u|; then p moves as the paper says."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)
    x = x.expand(3, 2, 4, 4).clone()
    search = Search(linear_problem(weight, x), x, 100)
    search.kept["learnt"] = x.new_zeros(3, 2, 2, 2)
    attack = Bandits(prior_size=2, prior_lr=0.3, exploration=0.5, fd_eta=0.2, norm=norm)
    draws, prior = SampleDraws((0,), torch.arange(3)), x.new_zeros(3, 2, 2, 2)
    for _ in range(3):
        u = draws.normal(prior) / 8**0.5
        sides = []
        for probe in (prior + 0.5 * u, prior - 0.5 * u):
            large = probe.repeat_interleave(2, 2).repeat_interleave(2, 3)
            large = large / large.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            sides.append((weight * large).sum((1, 2, 3), keepdim=True) * 0.2)
        gradient = (sides[0] - sides[1]) / (0.2 * 0.5) * u
        if norm == "l2":
            prior = prior + 0.3 * gradient
        else:
            up, down = (1 + prior) / 2 * torch.exp(0.3 * gradient), (1 - prior) / 2 * torch.exp(-0.3 * gradient)
            prior = 2 * up / (up + down) - 1
        attack.learn(search)
        torch.testing.assert_close(attack.prior(search), prior, atol=1e-9, rtol=0)
    assert search.spent == 7


@pytest.mark.parametrize("attack", [NES(0.1, directions=40, sigma=0.1), Bandits(0.1, prior_size=None, prior_lr=1.0)])
def test_estimates_reach_most_of_the_worst_case_of_a_linear_network(attack):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1, 4, 4, generator=generator), torch.full((20, 1, 4, 4), 0.5)
    net = Logits(lambda x: torch.stack([torch.full((len(x),), 2.0), (x * weight).flatten(1).sum(1)], 1))
    attack.n_queries = 600
    rise = (attack(net, x, torch.zeros(20, dtype=torch.int64)) - x).mul(weight).sum((1, 2, 3))
    assert rise.min() > 0.8 * 0.1 * weight.abs().sum()
