"""FAB and its projections: against bisection, closed forms, the public code's verdicts and counted passes."""

import itertools

import pytest
import torch
from torch import nn

from robust_pl.callbacks import FAB
from robust_pl.callbacks.attacks.fab_paths import Paths
from robust_pl.callbacks.attacks.ledger import Progress
from robust_pl.functional.geometry import NORMS, size
from robust_pl.functional.hyperplane import to_hyperplane

DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
every_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Projections ------------------------------------------------------------------------------------------------------


def planes(count=200, dims=12, seed=0):
    """Points with some at the faces of the box, normals with some zeros, gaps that are small, large and out of reach."""
    generator = torch.Generator().manual_seed(seed)
    x = (1.6 * torch.rand(count, dims, generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    normal = torch.randn(count, dims, generator=generator, dtype=torch.float64) ** 3
    normal[torch.rand(count, dims, generator=generator) < 0.2] = 0
    normal[:, 3] = normal[:, 4]  # a tie
    reach = reachable(x, normal, torch.ones(count))
    gap = reach * torch.rand(count, generator=generator, dtype=torch.float64)
    gap[::2] *= -reachable(x, normal, -torch.ones(count))[::2] / reach[::2]
    gap[::5] *= 3
    return x, normal, gap


def reachable(x, normal, sign):
    """How far the box lets <normal, x> fall, or rise where sign is negative."""
    fall = (normal.clamp_min(0) * x - normal.clamp_max(0) * (1 - x)).sum(1)
    rise = (normal.clamp_min(0) * (1 - x) - normal.clamp_max(0) * x).sum(1)
    return torch.where(sign > 0, fall, rise)


def by_bisection(x, normal, gap, norm):
    """The same by halving the level 200 times, one coordinate order for l1."""
    down = torch.sign(gap).unsqueeze(1) * normal
    room = torch.where(down > 0, x, 1 - x) * (normal != 0)

    def lengths(level):
        if norm == "linf":
            return torch.minimum(level, room)
        if norm == "l2":
            return torch.minimum(level * normal.abs(), room)
        return torch.where(normal.abs() * level >= 1, room, torch.zeros_like(room))

    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), 1e9, dtype=x.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        enough = (normal.abs() * lengths(middle)).sum(1, keepdim=True) >= gap.abs().unsqueeze(1)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return lengths(low), lengths(high)


@every_norm
def test_projections_are_those_of_a_bisection(norm):
    x, normal, gap = planes()
    delta = to_hyperplane(x, normal, gap, norm)
    feasible = gap.abs() < reachable(x, normal, gap)
    assert 100 < feasible.sum() < 190
    assert (x + delta).min() >= -1e-12 and (x + delta).max() <= 1 + 1e-12
    torch.testing.assert_close((normal * delta).sum(1)[feasible], -gap[feasible])
    assert (delta[normal == 0] == 0).all()
    assert (delta * normal * gap.sign().unsqueeze(1) <= 0).all()
    low, high = by_bisection(x, normal, gap, norm)
    if norm == "l1":  # all larger weights at their limits, all smaller ones at rest, and those at the level in between
        assert (delta.abs() >= low - 1e-9)[feasible].all() and (delta.abs() <= high + 1e-9)[feasible].all()
    else:
        torch.testing.assert_close(delta.abs()[feasible], high[feasible], atol=1e-9, rtol=0)
    corner = torch.where(normal * gap.sign().unsqueeze(1) > 0, -x, 1 - x) * (normal != 0)
    torch.testing.assert_close(delta[~feasible], corner[~feasible])


@every_norm
def test_no_other_point_is_nearer(norm):
    """KKT by trial: moving along the hyperplane inside the box never shortens delta."""
    x, normal, gap = planes(seed=1)
    delta = to_hyperplane(x, normal, gap, norm)
    feasible = gap.abs() < reachable(x, normal, gap)
    generator = torch.Generator().manual_seed(2)
    tried = 0
    for _, scale in itertools.product(range(100), (1e-3, 0.1, 1.0)):
        other = ((x + delta + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)).clamp(0, 1)) - x
        # Back onto the hyperplane by one free coordinate, if the box allows.
        which = normal.abs().argmax(1, keepdim=True)
        miss = -gap - (normal * other).sum(1)
        other = other.scatter_add(1, which, (miss / normal.gather(1, which).squeeze(1)).unsqueeze(1))
        valid = feasible & ((x + other >= 0) & (x + other <= 1)).all(1)
        tried += valid.sum().item()
        assert (size(other, norm) >= size(delta, norm) - 1e-9)[valid].all()
    assert tried > 2000


def test_projections_by_hand():
    x = torch.tensor([[0.1, 0.5, 0.5, 0.9]])
    normal, gap = torch.tensor([[2.0, 1.0, -1.0, 0.0]]), torch.tensor([0.7])
    # linf: 2 * 0.1 from the first pixel, which is then black, and 0.25 from the next two.
    torch.testing.assert_close(to_hyperplane(x, normal, gap, "linf"), torch.tensor([[-0.1, -0.25, 0.25, 0.0]]))
    # l2: the same rates for the next two, so the same here.
    torch.testing.assert_close(to_hyperplane(x, normal, gap, "l2"), torch.tensor([[-0.1, -0.25, 0.25, 0.0]]))
    # l1: the first, then the first of the two equal ones.
    torch.testing.assert_close(to_hyperplane(x, normal, gap, "l1"), torch.tensor([[-0.1, -0.5, 0.0, 0.0]]))
    # From the other side, nothing is in the way: 4 * d = 0.7 for linf, (4 + 1 + 1) * level = 0.7 for l2.
    torch.testing.assert_close(to_hyperplane(x, normal, -gap, "linf"), torch.tensor([[0.175, 0.175, -0.175, 0.0]]))
    expected = 0.7 / 6 * torch.tensor([[2.0, 1.0, -1.0, 0.0]])
    torch.testing.assert_close(to_hyperplane(x, normal, -gap, "l2"), expected)
    torch.testing.assert_close(to_hyperplane(x, normal, -gap, "l1"), torch.tensor([[0.35, 0.0, 0.0, 0.0]]))
    # Out of reach: 2 * 0.1 + 0.5 + 0.5 = 1.2 is all there is.
    for norm in NORMS:
        torch.testing.assert_close(to_hyperplane(x, normal, gap + 1, norm), torch.tensor([[-0.1, -0.5, 0.5, 0.0]]))


@every_norm
def test_projections_know_no_scale(norm):
    """Weights of 1e-30 are as good as any: their squares would be zero in float32."""
    x, normal, gap = (t.float() for t in planes())
    expected = to_hyperplane(x, normal, gap, norm)
    torch.testing.assert_close(to_hyperplane(x, normal * 2.0**-100, gap * 2.0**-100, norm), expected, atol=1e-6, rtol=0)
    assert (to_hyperplane(x, torch.zeros_like(x), gap, norm) == 0).all()
    assert (to_hyperplane(x, normal, torch.zeros_like(gap), norm) == 0).all()


@every_norm
def test_two_points_may_share_a_hyperplane(norm):
    x, normal, gap = planes()
    both = to_hyperplane(torch.stack([x, 1 - x]), normal, torch.stack([gap, gap / 2]), norm)
    assert torch.equal(both[0], to_hyperplane(x, normal, gap, norm))
    assert torch.equal(both[1], to_hyperplane(1 - x, normal, gap / 2, norm))


# Networks of which the answer is known ----------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits of a random linear network on images (1, 4, 4), that of the first class ``ahead`` of the others."""

    def __init__(self, classes=5, ahead=0.0):
        super().__init__()
        self.weight = torch.randn(classes, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.ahead = ahead * torch.eye(classes, dtype=torch.float64)[0]

    def forward(self, x):
        return (x.flatten(1).double() - 0.5) @ self.weight.T + self.ahead


def near_the_middle(count=24):
    """Grey enough that the box is not in the way."""
    return 0.5 + 0.1 * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@every_norm
@pytest.mark.parametrize("n_targets", [4, None])
def test_distance_of_a_linear_network(norm, n_targets):
    """|f| / |w|_q to the nearest of the hyperplanes between the label and another class."""
    net, x = Linear(), near_the_middle()
    logits = net(x)
    y = logits.argmax(1)
    found = FAB(None, norm=norm, steps=40, n_targets=n_targets).run(net, x, y)
    slopes = (net.weight.unsqueeze(0) - net.weight[y].unsqueeze(1)).norm(DUAL[norm], dim=2)
    distances = (logits.gather(1, y.unsqueeze(1)) - logits) / slopes
    exact = distances.masked_fill(nn.functional.one_hot(y, 5).bool(), torch.inf).amin(1)
    assert (net(found.x_adv).argmax(1) != y).all()
    ratio = found.norms / exact
    assert ratio.min() >= 1 and ratio.max() < 1.01


CONFORMANCE = {
    "linf": (0.006, "3 7 9 11 13 17 21 29 30 33 35 36 41 44 45 47 50 51 57 59 61"),
    "l2": (
        0.08,
        "1 2 3 5 7 9 10 11 13 15 17 19 21 25 29 30 33 34 35 36 39 41 44 45 47 49 50 51 54 57 59 61 62",
    ),
    "l1": (1.0, "3 7 9 11 13 15 17 21 29 30 33 34 35 36 41 44 45 47 50 51 57 59 61 62"),
}


def toy():
    """The network, images and labels on which the public code was run; four samples out of 64 are misclassified on purpose."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 16, 16, generator=generator)
    first, second = torch.randn(64, 768, generator=generator) / 768**0.5, torch.randn(10, 64, generator=generator) / 8

    def net(x):
        return ((x.flatten(1) - 0.5) @ first.T * 8).relu() @ second.T

    y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    return Function(net), x, y


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@every_norm
def test_the_samples_that_stand_are_those_of_the_public_code(norm):
    net, x, y = toy()
    eps, standing = CONFORMANCE[norm]
    found = FAB(eps, norm=norm).run(net, x, y)
    stands = net(found.x_adv).argmax(1) == y
    assert stands.nonzero().flatten().tolist() == [int(i) for i in standing.split()]
    assert torch.equal(found.x_adv[::8], x[::8])  # misclassified as they were
    # Early stops save most of what a broken sample would cost.
    passes = found.backward_passes.of_each
    broken = ~stands
    broken[::8] = False
    assert passes[stands].min() >= 900 and passes[broken].max() < 900 and passes[broken].median() < 30
    assert passes[::8].max() == 0


# The search -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    """A convolution network in float64 of five classes, with labels that are its own predictions."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
        ).double()
        x = torch.rand(20, 1, 8, 8, dtype=torch.float64)
    return net.requires_grad_(False), x, net(x).argmax(1)


EPS = {"linf": (0.002, 0.006, 0.02), "l2": (0.01, 0.03, 0.1), "l1": (0.05, 0.15, 0.5)}


@every_norm
@pytest.mark.parametrize("n_targets", [3, None])
def test_with_and_without_a_radius_the_verdicts_agree(norm, n_targets, small):
    net, x, y = small
    free = FAB(None, norm=norm, steps=20, n_targets=n_targets).run(net, x, y)
    assert (net(free.x_adv).argmax(1) != y).all()
    broken = []
    for eps in EPS[norm]:
        found = FAB(eps, norm=norm, steps=20, n_targets=n_targets).run(net, x, y)
        fooled = net(found.x_adv).argmax(1) != y
        assert torch.equal(fooled, free.norms <= eps)
        assert torch.equal(found.x_adv[~fooled], x[~fooled])
        assert found.forwards < free.forwards
        broken.append(fooled.sum().item())
    assert broken[0] < broken[1] < broken[2]


@every_norm
@pytest.mark.parametrize("eps", [None, "middle"])
def test_outcomes_do_not_depend_on_the_batch(norm, eps, small):
    """Targets side by side, samples that drop out, chunks and random starts: whatever else is in the batch."""
    net, x, y = small
    eps = EPS[norm][1] if eps else None
    attack = FAB(eps, norm=norm, steps=12, n_targets=4, restarts=2)
    index = torch.arange(20) + 11
    whole = attack.run(net, x, y, index=index)
    rows = torch.tensor([4, 17, 3])
    for part in (rows, rows[:1], torch.arange(19, -1, -1)):
        found = attack.run(net, x[part], y[part], index=index[part])
        torch.testing.assert_close(found.x_adv, whole.x_adv[part], atol=1e-9, rtol=0)
        assert torch.equal(found.forward_passes.of_each, whole.forward_passes.of_each[part])


def test_gradients_taken_ahead_change_no_iterate(small, monkeypatch):
    net, x, y = small
    ahead = FAB(None, norm="l1", steps=25, n_targets=4).run(net, x, y)
    cross = Paths.cross
    monkeypatch.setattr(Paths, "cross", lambda paths, foresee: cross(paths, False))
    plain = FAB(None, norm="l1", steps=25, n_targets=4).run(net, x, y)
    torch.testing.assert_close(ahead.x_adv, plain.x_adv, atol=1e-9, rtol=0)
    assert (plain.forwards, plain.backwards) == (20 * (1 + 4 * 2 * 25), 20 * 4 * 25)
    saved, wasted = plain.forwards - ahead.forwards, ahead.backwards - plain.backwards
    assert saved > wasted > 0


# Passes -----------------------------------------------------------------------------------------------------------


def test_passes_where_no_step_crosses():
    """With the right logit far ahead: the clean pass, then a gradient a step; the habit costs two passes to learn."""
    net, x = Linear(ahead=1e3), near_the_middle()
    y = net(x).argmax(1)
    found = FAB(0.01, steps=10, n_targets=3).run(net, x, y)
    assert found.forward_passes.of_each.unique().tolist() == [1 + 3 * (10 + 3)]
    assert found.backward_passes.of_each.unique().tolist() == [3 * 10]


def test_passes_where_every_step_crosses():
    """On a linear network, with a ball that no step reaches."""
    net, x = Linear(), near_the_middle()
    y = net(x).argmax(1)
    found = FAB(1e-9, steps=10, n_targets=3).run(net, x, y)
    # Ten gradients a target; two crossings are seen, then seven are taken for granted, and the last is seen.
    assert found.forward_passes.of_each.unique().tolist() == [1 + 3 * (10 + 3)]
    assert found.backward_passes.of_each.unique().tolist() == [3 * 10]
    found = FAB(1e-9, steps=10, n_targets=None, restarts=2).run(net, x, y)
    assert found.forward_passes.of_each.unique().tolist() == [1 + 2 * 2 * 10]
    assert found.backward_passes.of_each.unique().tolist() == [2 * 5 * 10]


def test_passes_of_samples_that_fall_at_once():
    net, x = Linear(), near_the_middle()
    y = net(x).argmax(1)
    y[5] = (y[5] + 1) % 5  # misclassified
    found = FAB(0.5, steps=10, n_targets=3).run(net, x, y)
    assert found.forward_passes.of_each.tolist() == [3] * 5 + [1] + [3] * 18
    assert found.backward_passes.of_each.tolist() == [1] * 5 + [0] + [1] * 18
    # A ball of radius 0 needs no search.
    radii = torch.full((24, 1, 1, 1), 0.5)
    radii[7] = 0
    found = FAB(0.5, steps=10, n_targets=3).run(net, x, y, eps=radii)
    assert found.forward_passes.of_each[7] == 1 and torch.equal(found.x_adv[7], x[7])


def test_batches_are_never_larger_than_the_callers(small):
    net, x, y = small
    seen = []
    handle = net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    FAB(1e-6, steps=5, n_targets=4).run(net, x, y)
    handle.remove()
    assert max(seen) == 20 and sum(n == 20 for n in seen) > len(seen) / 2
    whole = FAB(EPS["l2"][1], norm="l2", steps=5, n_targets=4).run(net, x, y).x_adv

    class Narrow(FAB):
        def perturb(self, problem, x, y):
            problem.rows_at_once = 7  # as an attack made of others may ask
            seen.clear()
            return super().perturb(problem, x, y)

    handle = net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    narrow = Narrow(EPS["l2"][1], norm="l2", steps=5, n_targets=4).run(net, x, y).x_adv
    handle.remove()
    assert seen[0] == 20 and max(seen[1:]) == 7
    torch.testing.assert_close(narrow, whole, atol=1e-9, rtol=0)


class Noting(Progress):
    def __init__(self):
        self.seen = []

    def show(self, part, standing, done):
        self.seen.append((part, standing, done))


def test_progress_is_shown(small):
    net, x, y = small
    noting = Noting()
    FAB(EPS["linf"][1], steps=20, n_targets=4).run(net, x, y, progress=noting)
    parts, standing, done = zip(*noting.seen, strict=True)
    assert set(parts) == {"fab-t"}
    assert standing[0] == 20 and list(standing) == sorted(standing, reverse=True) and 0 < standing[-1] < 20
    assert done[0] == 0 and list(done) == sorted(done) and done[-1] == 0.25 + 0.75 * 15 / 20
    noting = Noting()
    FAB(1e-9, steps=20, n_targets=None, restarts=3).run(net, x, y, progress=noting)
    assert [d for _, _, d in noting.seen] == pytest.approx([i / 12 for i in range(12)])
    assert {p for p, _, _ in noting.seen} == {"fab"}


# Random starts ----------------------------------------------------------------------------------------------------


class Starting(FAB):
    def _random_start(self, problem, distance, restart):
        start = super()._random_start(problem, distance, restart)
        self.found, self.starts = distance.clone(), size(start - problem.x, self.norm)
        return start


@every_norm
def test_restarts_begin_at_half_the_radius(norm):
    net, x = Linear(), near_the_middle()
    y = net(x).argmax(1)
    free = Starting(None, norm=norm, steps=2, n_targets=2, restarts=2)
    free(net, x, y)
    torch.testing.assert_close(free.starts, free.found / 2)
    bounded = Starting(1e-6, norm=norm, steps=2, n_targets=2, restarts=2)
    bounded(net, x, y)
    torch.testing.assert_close(bounded.starts, torch.full_like(bounded.starts, 5e-7))
    nothing = Starting(None, norm=norm, steps=1, n_targets=2, restarts=2)
    nothing(Linear(ahead=1e3), x, torch.zeros_like(y))
    expected = {"linf": 0.15, "l2": 0.5, "l1": 2.5}[norm]
    assert nothing.starts.median().item() == pytest.approx(expected)  # the box cuts some short


class Plateau(nn.Module):
    """Flat until the first pixel is above 0.55, and of another class from 0.6 on."""

    def forward(self, x):
        rise = (x[:, 0, 0, 0] - 0.55).relu() - 0.05
        return torch.stack([torch.zeros_like(rise), rise, rise - 1], 1)


@pytest.mark.parametrize("n_targets", [2, None])
def test_restarts_leave_a_plateau(n_targets):
    x, y = torch.full((64, 1, 2, 2), 0.5), torch.zeros(64, dtype=torch.int64)
    stuck = FAB(0.4, steps=10, n_targets=n_targets)(Plateau(), x, y)
    assert torch.equal(stuck, x)
    # A start lies above 0.55 with probability 3 / 8, or a little more where another pixel is the largest.
    found = FAB(0.4, steps=10, n_targets=n_targets, restarts=4).run(Plateau(), x, y)
    assert 0.6 < (Plateau()(found.x_adv).argmax(1) == 1).float().mean() < 0.95
    free = FAB(None, steps=10, n_targets=n_targets, restarts=12).run(Plateau(), x, y)
    norms = free.norms[free.norms > 0]
    assert len(norms) > 60
    torch.testing.assert_close(norms, torch.full_like(norms, 0.1), atol=0.01, rtol=0)


def test_restarts_never_lose(small):
    net, x, y = small
    once, twice = (FAB(None, norm="l1", steps=8, n_targets=4, restarts=r).run(net, x, y).norms for r in (1, 2))
    assert (twice <= once).all()
    assert not FAB().is_random and FAB(restarts=2).is_random


# Bad input --------------------------------------------------------------------------------------------------------


def test_more_targets_than_classes_are_refused(small):
    net, x, y = small
    FAB(0.01, steps=2, n_targets=4)(net, x, y)
    with pytest.raises(ValueError, match=r"n_targets=5, and of the network's 5 classes only 4 .*set n_targets to 4 or less"):
        FAB(0.01, steps=2, n_targets=5)(net, x, y)
    FAB(0.01, steps=2, n_targets=None)(net, x, y)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"n_targets": 0}, "n_targets=0 must be"),
        ({"restarts": 1.5}, "restarts=1.5 must be"),
        ({"alpha_max": 1.5}, r"alpha_max=1.5 must lie in \[0, 1\]"),
        ({"eta": 0.5}, "eta=0.5 must be at least 1"),
        ({"beta": 1.0}, "beta=1.0 must lie between 0 and 1"),
        ({"norm": "l3"}, "norm='l3' is unknown"),
        ({"eps": 8}, "did you mean 8/255"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        FAB(**wrong)
