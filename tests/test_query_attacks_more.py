"""SimBA, SignHunter and QueryNet: what they query, what it costs, and what they reach where the answer is known."""

from functools import partial

import pytest
import scipy.fft
import torch
from torch import nn

from robust_pl.callbacks import QueryNet, SignHunter, SimBA, Square
from robust_pl.callbacks.attacks.draws import StreamDraws
from robust_pl.callbacks.attacks.memory import Memory
from robust_pl.callbacks.attacks.problem import Objective, Problem
from robust_pl.callbacks.attacks.query import Search, query_statistics
from robust_pl.callbacks.attacks.querynet import Team
from robust_pl.callbacks.attacks.signhunter import chunks
from robust_pl.callbacks.attacks.simba import cosine, pixel
from robust_pl.callbacks.attacks.surrogates import LEAST_STEPS, Surrogates, build
from robust_pl.data import DigitsDataModule
from robust_pl.functional import losses
from robust_pl.nets import SmallCNN
from tests.attack_table import QUERYNET
from tests.test_attacks import linear, one_thread, samples, trained  # noqa: F401

MAKERS = {
    "simba": partial(SimBA, 1.0),
    "simba_dct": partial(SimBA, 1.0, freq_dims=4),
    "signhunter": partial(SignHunter, 0.1),
    "querynet": partial(QueryNet, 0.1, p_init=0.4, **QUERYNET),
}
every_attack = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Watched(nn.Module):
    """Keeps what was queried."""

    def __init__(self, net):
        super().__init__()
        self.net, self.queries = net, []

    def forward(self, x):
        self.queries.append(x.clone())
        return self.net(x)


# Budgets ----------------------------------------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("n_queries", [1, 2, 3, 12])
def test_a_sample_that_stands_costs_exactly_its_budget(make, n_queries):
    x, _ = samples(5, seed=2)
    stubborn = Watched(linear(torch.zeros(3, 64), torch.tensor([9.0, 0.0, 0.0])))
    found = make(n_queries=n_queries).run(stubborn, x, torch.zeros(5, dtype=torch.int64))
    assert found.forward_passes.of_each.tolist() == [n_queries] * 5
    assert [len(q) for q in stubborn.queries] == [5] * n_queries


@every_attack
def test_a_sample_that_is_wrong_already_costs_one_query(make, trained):  # noqa: F811
    x, y = samples(6, seed=2)
    found = make(n_queries=40).run(trained, x, (y + 1) % 3)
    assert found.forward_passes.of_each.tolist() == [1] * 6


@every_attack
def test_the_last_query_is_the_first_success_and_is_returned(make, trained):  # noqa: F811
    x, y = samples(6, seed=2)
    for i in range(6):
        net = Watched(trained)
        found = make(n_queries=40).run(net, x[i : i + 1], y[i : i + 1])
        wrong = [(trained(q).argmax(1) != y[i]).item() for q in net.queries]
        assert found.forwards == len(net.queries)
        if len(net.queries) < 40:
            assert wrong == [False] * (len(wrong) - 1) + [True]
            assert torch.equal(found.x_adv, net.queries[-1])
        else:
            assert not any(wrong[:-1])


@every_attack
def test_more_queries_never_fool_less(make, trained):  # noqa: F811
    """And a success does not depend on the budget that was left."""
    x, y = samples(30, seed=2)
    index, before = torch.arange(30), None
    for n_queries in (4, 12, 40):
        found = make(n_queries=n_queries).run(trained, x, y, index=index)
        fooled, queries = trained(found.x_adv).argmax(1) != y, found.forward_passes.of_each
        assert (queries[~fooled] == n_queries).all()
        if before is not None:
            assert fooled[before[0]].all()
            assert torch.equal(queries[before[0]], before[1][before[0]])
        before = fooled, queries
    assert before[0].float().mean() > 0.3


@every_attack
def test_logits_without_gradients_are_enough(make, trained):  # noqa: F811
    class Rounded(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return (trained(x).detach() * 100).round() / 100

    x, y = samples(30, seed=2)
    found = make(n_queries=60).run(Rounded(), x, y)
    assert found.backwards == 0
    assert (trained(found.x_adv).argmax(1) != y).float().mean() > 0.2


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(SimBA, step_size=0), "step_size=0 must be above 0"),
        (partial(SimBA, freq_dims=0), "freq_dims=0 must be a whole number of at least 1"),
        (partial(SimBA, n_queries=0), "n_queries=0 must be a whole number of at least 1"),
        (partial(SignHunter, objective="kl"), "objective='kl' is unknown"),
        (partial(QueryNet, norm="l1"), "norm='l1' is unknown: choose one of linf, l2"),
        (partial(QueryNet, p_init=0.0), r"p_init=0.0 must lie in \(0, 1\]"),
        (partial(QueryNet, n_surrogates=0), "n_surrogates=0 must be a whole number of at least 1"),
        (partial(QueryNet, memory=1.5), "memory=1.5 must be a whole number of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# SimBA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plane():
    """A linear network of two classes that says 0 wherever the attack gets, and w, which raises class 1; C, H, W = 3, 2, 2."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return linear(torch.stack([-w / 2, w / 2]), torch.tensor([9.0, -9.0], dtype=torch.float64)), x, w


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_simba_takes_the_steps_that_a_linear_network_asks_for(objective, plane):
    """x - 0.2 e_k helps where w_k < 0 and costs one query; else x + 0.2 e_k is the second. So all 12 cost 12 + #(w > 0)."""
    net, x, w = plane
    cost = 1 + 12 + int((w > 0).sum())
    watched = Watched(net)
    attack = SimBA(2.0, 0.2, n_queries=cost, objective=objective)
    found = attack.run(watched, x, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(found.x_adv, x + 0.2 * w.sign().view(3, 2, 2))
    orders = []
    for queries in torch.stack(watched.queries, 1).flatten(2):
        current, order, queries = queries[0], [], list(queries[1:])
        while queries:
            step = queries.pop(0) - current
            (k,) = (step.abs() > 1e-9).nonzero().flatten().tolist()
            assert step[k].item() == pytest.approx(-0.2)
            if w[k] > 0:
                torch.testing.assert_close(queries.pop(0) - current, -step)
                step = -step
            current = current + step
            order.append(k)
        assert sorted(order) == list(range(12))
        orders.append(tuple(order))
    assert len(set(orders)) == 6  # each sample has an order of its own


def test_simba_starts_its_order_again_and_stops_at_the_sphere(plane):
    net, x, w = plane
    y = torch.zeros(6, dtype=torch.int64)
    once = 12 + int((w > 0).sum())
    twice = SimBA(2.0, 0.1, n_queries=1 + 2 * once)(net, x, y)
    torch.testing.assert_close(twice, x + 0.2 * w.sign().view(3, 2, 2))
    far = SimBA(0.45, 0.2, n_queries=400)(net, x, y) - x
    torch.testing.assert_close(far.flatten(1).norm(dim=1), torch.full((6,), 0.45, dtype=torch.float64))
    # Steps of 0.2 on a sphere of 0.45 end near the worst case, w / |w|_2.
    assert (far.flatten(1) @ w / (0.45 * w.norm()) > 0.8).all()


def test_simba_under_linf_clips_each_pixel(plane):
    net, x, w = plane
    attack = SimBA(0.05, 0.2, norm="linf", n_queries=1 + 12 + int((w > 0).sum()))
    torch.testing.assert_close(attack(net, x, torch.zeros(6, dtype=torch.int64)), x + 0.05 * w.sign().view(3, 2, 2))


@pytest.mark.parametrize(("shape", "low"), [((1, 8, 8), 8), ((3, 6, 4), 5), ((2, 5, 7), 3)])
def test_cosines_are_those_of_scipy(shape, low):
    channels, height, width = shape
    rows, columns = min(low, height), min(low, width)
    count = channels * rows * columns
    found = cosine(torch.arange(count), torch.zeros(count, *shape, dtype=torch.float64), low)
    torch.testing.assert_close(found.flatten(1) @ found.flatten(1).T, torch.eye(count, dtype=torch.float64))
    for i, (c, u, v) in enumerate((c, u, v) for c in range(channels) for u in range(rows) for v in range(columns)):
        frequencies = torch.zeros(shape, dtype=torch.float64)
        frequencies[c, u, v] = 1
        expected = torch.from_numpy(scipy.fft.idctn(frequencies.numpy(), axes=(1, 2), norm="ortho"))
        torch.testing.assert_close(found[i], expected)


def test_pixels_are_those_of_the_flattened_image():
    found = pixel(torch.tensor([0, 5]), torch.ones(2, 2, 2, 2))
    assert found.flatten(1).argmax(1).tolist() == [0, 5]
    assert found.sum().item() == 2


def test_simba_dct_moves_low_frequencies_only(plane):
    net, x, _ = plane
    delta = SimBA(1.0, 0.1, n_queries=30, freq_dims=1)(net, x, torch.zeros(6, dtype=torch.int64)) - x
    torch.testing.assert_close(delta, delta.mean((2, 3), keepdim=True).expand_as(delta))
    assert (delta.flatten(1).norm(dim=1) > 0).all()


# SignHunter -------------------------------------------------------------------------------------------------------


def test_chunks_halve_down_to_single_values():
    assert [(c.start, c.stop) for c in chunks(5)] == [
        (0, 5), (0, 3), (3, 5), (0, 2), (2, 4), (4, 5), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5),
    ]  # fmt: skip
    assert [(c.start, c.stop) for c in chunks(1)] == [(0, 1)]
    assert sum(1 for _ in chunks(64)) == 127


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_signhunter_reaches_the_worst_case_of_a_linear_network(objective, plane):
    """One pass over 12 values: chunks of 12, 6, 3, 2 and 1 are 1 + 2 + 4 + 6 + 12 queries, after the one at the start."""
    net, x, w = plane
    y = torch.zeros(6, dtype=torch.int64)
    x_adv = SignHunter(0.1, n_queries=26, objective=objective)(net, x, y)
    torch.testing.assert_close(x_adv, x + 0.1 * w.sign().view(3, 2, 2))
    rise = losses.margin(net(x_adv), y) - losses.margin(net(x), y)
    torch.testing.assert_close(rise, torch.full_like(rise, 0.1 * w.abs().sum().item()))
    assert (SignHunter(0.1, n_queries=10)(net, x, y) != x_adv).any()


def test_signhunter_starts_again_from_the_image_it_reached(plane):
    net, x, w = plane
    watched = Watched(net)
    SignHunter(0.1, n_queries=27)(watched, x, torch.zeros(6, dtype=torch.int64))
    corner = w.sign().view(3, 2, 2)
    torch.testing.assert_close(watched.queries[0], x + 0.1)
    torch.testing.assert_close(watched.queries[1], x - 0.1)
    torch.testing.assert_close(watched.queries[26], x + 0.1 * (corner > 0))  # x + 0.1 corner + 0.1, projected


# QueryNet ---------------------------------------------------------------------------------------------------------


def answers(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1)


def test_memory_writes_over_the_oldest():
    image, ids = torch.ones(3, 1, 2, 2), torch.tensor([0, 1, 2])
    memory = Memory(4, 3, 2, image, answers(0, 0, 0))
    memory.add(ids, image, answers(0, 1, 2), answers(0, 1, 2).squeeze(1))
    assert len(memory) == 3
    memory.add(ids[:2], image[:2] * 3, answers(3, 4), answers(3, 4).squeeze(1))
    assert len(memory) == 4
    assert memory.logits.flatten().tolist() == [4, 1, 2, 3]
    images, values, there = memory.of(ids)
    assert there.tolist() == [[False, True], [True, True], [True, False]]  # the first query is written over
    assert values[there].tolist() == [3, 1, 4, 2]
    assert images[there][:, 0, 0, 0].tolist() == [3, 1, 3, 1]
    memory.add(ids[1:2], image[:1] * 5, answers(5), answers(5).squeeze(1))
    assert sorted(memory.of(ids)[1][1].tolist()) == [4, 5]  # the latest two
    images, logits = memory.batch(3, torch.Generator().manual_seed(0))
    assert len(set(logits.flatten().tolist())) == 3
    assert len(memory.batch(100, torch.Generator())[0]) == 4


def filled(count=256, scale=10.0):
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.rand(count, 1, 8, 8, generator=generator), torch.randn(64, 3, generator=generator)
    logits = scale * (images.flatten(1) - 0.5) @ weight
    memory = Memory(count, count, 2, images, logits)
    memory.add(torch.arange(count), images, logits, logits[:, 0])
    return memory, weight


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_surrogates_learn_the_answers_whatever_their_scale(scale):
    memory, weight = filled(scale=scale)
    surrogates = Surrogates(2, 8, memory, seed=0)

    def unexplained():
        return [((found - memory.logits).var() / memory.logits.var()).item() for found in surrogates.logits(memory.images)]

    assert min(unexplained()) > 0.5
    surrogates.fit(memory, 400, 64)
    assert max(unexplained()) < 0.15
    for gradient in surrogates.gradients(memory.images[:64], lambda logits: logits[:, 1]):
        assert torch.cosine_similarity(gradient.flatten(1), weight[:, 1].unsqueeze(0)).mean() > 0.5


def test_surrogates_differ_in_depth_and_follow_their_seed():
    memory, _ = filled()
    first, again, other = (Surrogates(3, 4, memory, seed) for seed in (0, 0, 1))
    depths = [sum(isinstance(layer, nn.Conv2d) for layer in net) for net in first.nets]
    assert len(set(depths)) == 3
    for surrogates in (first, again):
        surrogates.fit(memory, 3, 32)
    outputs = [torch.stack(s.logits(memory.images[:5])) for s in (first, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 32, 32), (3, 9, 13), (3, 224, 224)])
def test_surrogates_fit_the_images(shape):
    with torch.random.fork_rng():
        net = build(5, 4, torch.Size(shape), 7)
    assert net(torch.rand(2, *shape)).shape == (2, 7)


def test_fitting_stops_early_once_the_answers_are_known(monkeypatch):
    memory, _ = filled()
    memory.logits.zero_()
    memory.logits[0] = 1  # a scale
    surrogates = Surrogates(1, 4, memory, seed=0)
    memory.logits.zero_()
    steps = []
    monkeypatch.setattr(memory, "batch", lambda *args: steps.append(1) or Memory.batch(memory, *args))
    surrogates.fit(memory, 2000, 32)
    assert LEAST_STEPS <= len(steps) < 2000
    steps.clear()
    surrogates.fit(memory, 5, 32)
    assert len(steps) == 5


@pytest.fixture
def team(trained):  # noqa: F811
    x, y = samples(30, seed=2)
    problem = Problem(
        trained, x, y, eps=0.1, norm="linf", objective=Objective(losses.margin, (y,)),
        draws=StreamDraws(0, x.device), dtype=x.dtype,
    )  # fmt: skip
    return Team(QueryNet(0.1, **{**QUERYNET, "min_picks": 5}), Search(problem, x, 100, look_every=1))


def test_proposers_follow_the_weights(team):
    """With two surrogates: 0 and 1, Square+ is 2 and Square is 3. A tie goes to Square+ before Square."""
    expected = {
        (1.0, 1.0, 0.0, 0.0): [0, 1, 2],
        (0.1, 0.5, 0.4, 0.0): [0, 1, 2],
        (0.1, 0.5, 0.5, 0.0): [2, 3],
        (0.1, 0.2, 0.5, 0.5): [2, 3],
        (0.1, 0.5, 0.2, 0.5): [3],
        (0.0, 0.0, 0.0, 0.0): [2, 3],
    }
    for weights, proposers in expected.items():
        team.weights = list(weights)
        assert list(team._proposers()) == proposers


def test_weights_are_the_share_of_queries_that_helped(team):
    """Of 30 samples 12 ask the first surrogate, 14 the second, 4 Square+; x itself never helps, a step of PGD does."""
    picks = torch.tensor([0] * 12 + [1] * 14 + [2] * 4)
    search = team.search
    assert search.goes_on()
    worse = search.x_best.clone()
    gradient = search.problem.gradient(search.x_best)
    helped = torch.arange(30) % 4 == 0
    better = search.problem.project(search.x_best + 0.01 * gradient.sign())
    team.query(torch.where(helped.view(-1, 1, 1, 1), better, worse), picks)
    assert team.weights == pytest.approx([3 / 12, 4 / 14, 0.0, 0.0])  # four picks are too few
    assert len(team.memory) == 60


def test_square_alone_learns_no_more(team):
    team.weights = [0.1, 0.1, 0.1, 0.2]
    assert team.search.goes_on()
    x_new, picks = team.choose(0)
    assert picks.tolist() == [3] * 30
    team.query(x_new, picks)
    assert (len(team.memory), team.weights) == (30, [0.1, 0.1, 0.1, 0.2])


def test_square_plus_estimates_the_slope_and_leaves_out_what_cannot_win():
    """On a linear network no slope exceeds |w_1 - w_0|_2, and where the slope is known an image below the bar is dropped."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(64, generator=generator)
    x, y = 0.4 + 0.2 * torch.rand(20, 1, 8, 8, generator=generator), torch.zeros(20, dtype=torch.int64)
    net = linear(torch.stack([-w / 2, w / 2]), torch.tensor([5.0, -5.0]))
    problem = Problem(
        net, x, y, eps=0.05, norm="linf", objective=Objective(losses.margin, (y,)),
        draws=StreamDraws(0, x.device), dtype=x.dtype,
    )  # fmt: skip
    team = Team(QueryNet(0.05, **QUERYNET), Search(problem, x, 100, look_every=1))
    team.weights = [0.0, 0.0, 1.0, 0.0]
    for iteration in range(6):
        assert team.search.goes_on()
        before = team.search.x_best
        x_new = team._promising_windows(iteration)
        slope = team.search.kept["lipschitz"]
        assert (slope <= w.norm() * (1 + 1e-4)).all()
        assert (slope > 0).all() == (iteration > 0)
        assert (x_new != before).flatten(1).any(1).all()
        team.query(x_new)
    images, values, there = team.memory.of(team.search.ids)
    assert there.sum(1).tolist() == [7] * 20
    torch.testing.assert_close(values[there], losses.margin(net(images[there]), y.repeat_interleave(7)).detach())


def digits():
    data = DigitsDataModule()
    return [part.read(torch.arange(len(part)), None) for part in (data.load_train(), data.load_test())]


@pytest.mark.slow
def test_querynet_needs_fewer_queries_than_square():
    """On digits at eps=0.2, within 100 queries, mean of all samples."""
    (x, y), (x_test, y_test) = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SmallCNN(10, 1, 16)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                losses.cross_entropy(net(x[rows]), y[rows]).mean().backward()
                optimizer.step()
    net.eval()
    right = net(x_test).argmax(1) == y_test
    assert right.float().mean() > 0.9
    x_test, y_test = x_test[right][:150], y_test[right][:150]
    fast = {"n_surrogates": 2, "width": 8, "first_steps": 150, "fit_steps": 30, "batch_size": 64, "min_picks": 2}
    for seed in range(3):
        means = []
        for attack in (
            QueryNet(0.2, n_queries=100, seed=seed, **fast),
            Square(0.2, n_queries=100, p_init=0.05, rescale_schedule=True, seed=seed),
            Square(0.2, n_queries=100, rescale_schedule=True, seed=seed),
        ):
            found = attack.run(net, x_test, y_test)
            fooled = net(found.x_adv).argmax(1) != y_test
            means.append(query_statistics(found.forward_passes.of_each, fooled, 100).mean_of_all)
        assert means[0] < 0.5 * min(means[1:])
