"""The constraint relaxation attack: its iterates by hand, its passes where they are forced, and how strong it is."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from robust_pl.callbacks import PGD, AutoAttack, CRAttack
from robust_pl.callbacks.attacks.draws import SampleDraws
from tests.masking_zoo import EPS, HONEST, digits, honest

FORWARDS, BACKWARDS = 12, 10  # of the screening


class Logits(nn.Module):
    """Logits that a function makes of the flattened pixels (B, D); keeps every batch of pixels that it was given."""

    def __init__(self, make):
        super().__init__()
        self.make, self.seen = make, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.make(x.flatten(1))


def constant(*logits):
    """The same logits everywhere, with gradients of zero."""
    return Logits(lambda flat: torch.tensor(logits, dtype=flat.dtype) + 0 * flat.sum(1, keepdim=True))


def grey(count=1, side=1):
    return torch.full((count, 1, side, side), 0.5, dtype=torch.float64)


# The rules ----------------------------------------------------------------------------------------------------------


def test_iterates_are_those_of_the_equations():
    """Quadratic logits in float64: everything that the network is shown, against the rules written down once more."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(3, 1, 3, 3, generator=generator, dtype=torch.float64)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 0.99])  # the box matters
    weight = 0.02 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    curve = torch.tensor([0.1, -0.2, 0.15, 0.05], dtype=torch.float64)
    bias = torch.tensor([0.2, 0.05, 0.1, -3.0], dtype=torch.float64)
    y, eps = torch.zeros(3, dtype=torch.int64), 0.1

    def logits(flat):
        middle = flat - 0.5
        return middle @ weight.T + bias + curve * (middle**2).sum(1, keepdim=True) / 2

    def slope(point, k):  # of logit k
        return weight[k].view(1, 1, 3, 3) + curve[k] * (point - 0.5)

    net = Logits(logits)
    attack = CRAttack(eps, n_targets=2, rounds=1, steps=14, cycle=6, seed=5)
    attacked = attack.run(net, x, y, index=torch.arange(3))

    def ball(point, radius):
        return torch.clamp(torch.clamp(point - x, -radius, radius) + x, 0, 1)

    draws = SampleDraws((5, "CRAttack", 0), torch.arange(3))
    point = ball(x + eps * (2 * draws.fork("screening").uniform(x) - 1), eps)
    shown = [x]
    for step in range(2):
        shown.append(point)
        share = logits(point.flatten(1)).softmax(1).view(3, 4, 1, 1)
        rise = sum((share[:, k : k + 1] - float(k == 0)) * slope(point, k) for k in range(4))
        point = ball(point + eps * (0.25 if step == 1 else 0.5) * rise.sign(), eps)
    shown.append(point)
    targets = logits(point.flatten(1))[:, 1:].argsort(1, descending=True)[:, :2] + 1
    assert (targets == torch.tensor([2, 1])).all()  # the same for all, so that one slope serves
    for rank, target in enumerate((2, 1)):
        numbers = draws.fork(f"0 {rank}")
        point = ball(x + eps * (2 * numbers.uniform(x) - 1), eps)
        for step in range(14):
            j, s = step % 6, (0.5, 0.25, 0.125)[step // 6]
            if j == 4:
                point = ball(ball(point, eps - eps * s) + eps * s * (2 * numbers.uniform(x) - 1), eps)
            shown.append(point)
            fall = (slope(point, 0) - slope(point, target)).sign()
            point = ball(point - eps * s * fall, eps + eps * s if j < 2 else eps)
            if j <= 2:
                shown.append(ball(point, eps))
    assert len(net.seen) == len(shown)
    for found, expected in zip(net.seen, shown, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    outside = torch.stack([(point - x).abs().amax() / eps for point in shown])
    assert outside.max() > 1.4 and (attacked.x_adv - x).abs().max() <= eps + 1e-12
    # Nothing is broken, and the image of the smallest margin inside the ball was kept.
    margins = torch.stack([m[:, 0] - m[:, 1:].amax(1) for m in map(logits, (s.flatten(1) for s in shown))])
    margins[torch.stack([(s - x).abs().flatten(1).amax(1) for s in shown]) > eps + 1e-12] = torch.inf
    assert (margins > 0).all()
    kept = logits(attacked.x_adv.flatten(1))
    torch.testing.assert_close(kept[:, 0] - kept[:, 1:].amax(1), margins.amin(0), atol=1e-12, rtol=0)


def lure():
    """Three classes on one pixel: towards 1 the margin falls to 0.04 within 0.1, towards 2 to 0.2 on the other side."""
    at = torch.tensor([0.0, 2.6, -1.0], dtype=torch.float64)
    base = torch.tensor([0.0, -0.3, -0.3], dtype=torch.float64)
    return Logits(lambda flat: base + at * (flat - 0.5))


@pytest.mark.parametrize("last", [False, True], ids=["near_first", "near_last"])
def test_later_rounds_are_for_pairs_that_came_near(last, monkeypatch):
    """Class 1 is tried five times; class 2 is given up when s falls below 0.2, in the third cycle of the only walk."""
    if last:
        screen = CRAttack._screen
        monkeypatch.setattr(CRAttack, "_screen", lambda self, *given: screen(self, *given).flip(1))
    attacked = CRAttack(0.1).run(lure(), grey(), torch.tensor([0]), index=torch.tensor([3]))
    assert attacked.forwards == FORWARDS + 5 * 205 + (80 + 3 * 11)
    assert attacked.backwards == BACKWARDS + 5 * 150 + 80
    torch.testing.assert_close(attacked.x_adv.item(), 0.6)


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        (12, False),  # the gradient at j = 0
        (13, True),  # the test on the side after it
        (32, False),  # the gradient at j = 10, of an iterate that is not in the ball
        (33, True),
        (34, True),  # the gradient at j = 11
        (52, True),  # that at j = 29
    ],
)
def test_what_counts_as_near(call, counts):
    """A margin of 0.06, which is given up in the fifth cycle, and in one of the passes of the first cycle one of 0.04."""
    net = Logits(lambda flat: torch.tensor([0.0, -0.04 if len(net.seen) == call + 1 else -0.06]) + 0 * flat)
    attacked = CRAttack(0.1, n_targets=1, rounds=2).run(net, grey().float(), torch.tensor([0]))
    walks = 2 if counts else 1
    assert (attacked.forwards, attacked.backwards) == (FORWARDS + walks * (140 + 5 * 11), BACKWARDS + walks * 140)


@pytest.mark.parametrize(
    ("call", "backwards"),
    [
        (0, 0),  # the image itself
        (1, 1),  # the random point
        (10, 10),
        (11, 10),  # the end of the screening
        (12, None),  # the gradient at j = 0 judges nothing
        (13, 11),
        (32, None),
        (33, 21),
        (34, 22),  # the gradient at j = 11
        (52, 40),  # that at j = 29
    ],
)
def test_what_counts_as_broken(call, backwards):
    """A margin of 0.06, and in one of the passes another prediction: nothing more is spent."""
    net = Logits(lambda flat: torch.tensor([0.0, 0.04 if len(net.seen) == call + 1 else -0.06]) + 0 * flat)
    attacked = CRAttack(0.1, n_targets=1, rounds=1).run(net, grey().float(), torch.tensor([0]))
    if backwards is None:
        assert (attacked.forwards, attacked.backwards) == (FORWARDS + 140 + 5 * 11, BACKWARDS + 140)
    else:
        assert (attacked.forwards, attacked.backwards) == (call + 1, backwards)
        torch.testing.assert_close(attacked.x_adv, net.seen[call], atol=0, rtol=0)


# What it costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "forwards", "backwards"),
    [
        (0.04, 5 * 205, 5 * 150),  # near each target in every round
        (0.05, 205, 150),  # near none, and at the last bound of giving up
        (0.1, 4 * 30 - 10 + 4 * 11, 4 * 30 - 10),  # given up in the fourth cycle, where s is 1/16
        (0.3, 2 * 30 - 10 + 2 * 11, 2 * 30 - 10),
        (1.0, 31, 20),
    ],
)
def test_passes_of_a_sample_that_stands(margin, forwards, backwards):
    attacked = CRAttack(0.1).run(constant(0.0, *[-margin] * 9), grey(), torch.tensor([0]))
    assert attacked.forwards == FORWARDS + 3 * forwards
    assert attacked.backwards == BACKWARDS + 3 * backwards
    if margin == 0.04:
        assert (attacked.forwards, attacked.backwards) == (3087, 2260)


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (4, 2), (10, 3), (100, 5), (200, 6)])
def test_number_of_targets(classes, targets):
    attacked = CRAttack(0.1).run(constant(0.0, *[-1.0] * (classes - 1)), grey(), torch.tensor([0]))
    assert (attacked.forwards, attacked.backwards) == (FORWARDS + targets * 31, BACKWARDS + targets * 20)
    fewer = CRAttack(0.1, n_targets=1).run(constant(0.0, *[-1.0] * (classes - 1)), grey(), torch.tensor([0]))
    assert (fewer.forwards, fewer.backwards) == (FORWARDS + 31, BACKWARDS + 20)


def test_each_sample_pays_for_itself():
    """Broken as it is, broken wherever it is moved, given up at once, and near all targets, in one batch and alone."""
    corner = torch.tensor([0.1, 0.3, 0.7, 0.9], dtype=torch.float64)

    def logits(flat):
        first = flat[:, :1]
        moved = (first - 0.3).abs() > 1e-9
        wrong = torch.where(first < 0.2, 1.0, torch.where(first < 0.5, torch.where(moved, 1.0, -1.0), -1.0))
        wrong = torch.where(first > 0.8, -0.04, wrong)
        return torch.cat([torch.zeros_like(first), wrong.expand(-1, 9)], 1) + 0 * first

    x, y = corner.view(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    make = partial(CRAttack, 0.05, n_targets=1, rounds=2)
    attacked = make().run(Logits(logits), x, y, index=torch.arange(4))
    assert attacked.forward_passes.of_each.tolist() == [1, 2, FORWARDS + 31, FORWARDS + 2 * 205]
    assert attacked.backward_passes.of_each.tolist() == [0, 1, BACKWARDS + 20, BACKWARDS + 2 * 150]
    assert (attacked.x_adv[0] == x[0]).all() and (attacked.x_adv[1] != x[1]).all()
    for i in range(4):
        alone = make().run(Logits(logits), x[i : i + 1], y[:1], index=torch.tensor([i]))
        assert (alone.forwards, alone.backwards) == (
            attacked.forward_passes.of_each[i],
            attacked.backward_passes.of_each[i],
        )
        assert torch.equal(alone.x_adv[0], attacked.x_adv[i])


@pytest.mark.parametrize("label", [0, 1])
def test_a_tie_counts_only_where_the_prediction_differs(label):
    """argmax takes the first of two equal logits. Class 2 is given up each time, and tried again since class 1 is near."""
    attacked = CRAttack(0.1).run(constant(0.0, 0.0, -9.0), grey(), torch.tensor([label]))
    assert attacked.forwards == (1 if label else FORWARDS + 5 * (205 + 31))


# What does not matter -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    """97 digits and a network trained adversarially."""
    x, y = digits("test")
    return deepcopy(honest("mlp_pgd_at")).double(), x[:97].double(), y[:97]


@pytest.fixture(scope="module")
def whole(task):
    net, x, y = task
    return CRAttack(EPS).run(net, x, y, index=torch.arange(97))


def test_batches_do_not_matter(task, whole):
    net, x, y = task
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    parts = [CRAttack(EPS).run(net, x[r], y[r], index=r, rank=1) for r in order.split(20)]
    torch.testing.assert_close(torch.cat([part.x_adv for part in parts]), whole.x_adv[order], atol=1e-9, rtol=0)
    for kind in ("forward_passes", "backward_passes"):
        each = torch.cat([getattr(part, kind).of_each for part in parts])
        assert torch.equal(each, getattr(whole, kind).of_each[order])


def test_looking_less_often_costs_passes_and_changes_nothing(task, whole, monkeypatch):
    """As on a GPU, where those that are done leave at the ends of thirds."""
    net, x, y = task
    monkeypatch.setattr(CRAttack, "_looks", lambda self, step, x_adv: (step + 1) % 10 == 0)
    seldom = CRAttack(EPS).run(net, x, y, index=torch.arange(97))
    torch.testing.assert_close(seldom.x_adv, whole.x_adv, atol=1e-9, rtol=0)
    assert whole.backwards < seldom.backwards < 2 * whole.backwards
    standing = net(whole.x_adv).argmax(1) == y
    assert torch.equal(seldom.backward_passes.of_each[standing], whole.backward_passes.of_each[standing])


def test_progress_rises(task):
    from robust_pl.callbacks.attacks.ledger import Progress

    class Told(Progress):
        def __init__(self):
            self.heard = []

        def show(self, part, standing, done):
            self.heard.append((part, standing, done))

    net, x, y = task
    told = Told()
    attacked = CRAttack(EPS, rounds=2).run(net, x, y, index=torch.arange(97), progress=told)
    parts, standing, done = zip(*told.heard, strict=True)
    assert set(parts) == {"cr"}
    assert list(standing) == sorted(standing, reverse=True) and standing[-1] == (net(attacked.x_adv).argmax(1) == y).sum()
    assert list(done) == sorted(done) and 0 < done[0] < done[-1] <= 1


# How strong it is ---------------------------------------------------------------------------------------------------


def robust(attack, net, x, y):
    """How many samples are classified right and stand, and the passes of a sample."""
    attacked = attack.run(net, x, y, index=torch.arange(len(x)))
    stands = (net(attacked.x_adv).argmax(1) == y) & (net(x).argmax(1) == y)
    return stands.sum().item(), (attacked.forwards + attacked.backwards) / len(x)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mlp_pgd_at", "cnn_pgd_at", "cnn_trades")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_pgd_at", *SLOW])
def test_it_is_stronger_than_pgd_and_near_autoattack(name):
    """Of 360 digits PGD-20, CR and AutoAttack left standing 257, 230 and 230 (linear), 285, 282 and 282 (MLP), 283, 276 and 276
    (CNN, eps 0.1), 184, 116 and 117 (CNN, eps 0.2); a bound of four leaves room for other versions of torch."""
    net, eps, (x, y) = honest(name).float(), HONEST[name][1], digits("test")
    (pgd, _), (cr, spent), (best, full) = (
        robust(a, net, x, y) for a in (PGD(eps, eps / 4, steps=20), CRAttack(eps), AutoAttack(eps))
    )
    assert cr < pgd
    assert abs(cr - best) <= 4
    assert spent < full / 15


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"norm": "l2"}, "norm='l2', and the constraint relaxation attack is made for linf alone: choose APGD"),
        ({"norm": "l1"}, "norm='l1', and the constraint relaxation attack"),
        ({"n_targets": 0}, "n_targets=0 must be a whole number of at least 1"),
        ({"rounds": 0}, "rounds=0 must be a whole number of at least 1"),
        ({"steps": 0}, "steps=0 must be"),
        ({"steps": 1.5}, "steps=1.5 must be"),
        ({"cycle": 0}, "cycle=0 must be"),
        ({"cycle": 20}, "cycle=20 must be a multiple of 6, such as 30"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        CRAttack(0.1, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("classes", "targets"), [(3, 3), (10, 12)])
def test_too_many_targets_are_refused(classes, targets):
    complaint = f"n_targets={targets} is too many: the network has {classes} classes, so set n_targets to at most {classes - 1}"
    with pytest.raises(ValueError, match=complaint):
        CRAttack(0.1, n_targets=targets)(constant(0.0, *[-1.0] * (classes - 1)), grey(), torch.tensor([0]))
    CRAttack(0.1, n_targets=classes - 1)(constant(0.0, *[-1.0] * (classes - 1)), grey(), torch.tensor([0]))
