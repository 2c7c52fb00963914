"""AutoAttack against the official code's verdicts on a network that was attacked with it, and what holds for the ensemble."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from robust_pl.callbacks import APGD, FAB, AutoAttack, Square
from robust_pl.callbacks.attacks.autoattack import VERSIONS
from robust_pl.callbacks.attacks.autoattack_checks import AutoAttackWarning, warn_of_square
from robust_pl.callbacks.attacks.ledger import Progress
from robust_pl.functional import geometry
from robust_pl.nets.folding import Folded

# Made with fra31/auto-attack @ a392200: seed 0, batches of 32.
EPS = {"linf": 0.006, "l2": 0.08, "l1": 1.0}
ROBUST = {
    "linf": "3 7 9 11 13 17 21 29 30 33 35 36 41 44 45 47 50 51 57 59 61",
    "l2": "1 2 3 5 7 9 10 11 13 15 17 19 21 25 29 30 33 34 35 36 39 41 44 45 47 49 50 51 54 57 59 61 62",
    "l1": "3 7 9 11 13 15 17 21 29 30 33 34 35 36 41 44 45 47 50 51 57 59 61 62",
}
AFTER = {"linf": (56, 24, 21, 21, 21), "l2": (56, 34, 33, 33, 33), "l1": (56, 26, 24, 24, 24)}
SQUARE_ALONE = {"linf": "2 10 15 34 39 49 62", "l2": "4 6 14 18 20 23 26 27 42 53 55 58 60 63", "l1": "2 5 10 19 25 39 49"}
CE_ALONE = {"linf": "15 34 62", "l2": "58", "l1": "10 19"}
slow_but_linf = [pytest.param(n, marks=() if n == "linf" else pytest.mark.slow) for n in geometry.NORMS]


class TwoLayers(nn.Module):
    def __init__(self, first, last):
        super().__init__()
        self.register_buffer("first", first)
        self.register_buffer("last", last)

    def forward(self, x):
        return torch.relu((x.flatten(1) - 0.5) @ self.first.T * 8) @ self.last.T


@functools.cache
def official_task():
    """Section 13 of the official results: 64 samples, of which every eighth is misclassified."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(64, 3, 16, 16)
        first, last = torch.randn(64, 768) / 768**0.5, torch.randn(10, 64) / 64**0.5
    net = TwoLayers(first, last).eval()
    y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    return net, x, y


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(text):
    return {int(number) for number in text.split()}


def standing(mask):
    return set(mask.nonzero().flatten().tolist())


# The official code's verdicts -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::robust_pl.callbacks.attacks.autoattack_checks.AutoAttackWarning")
@pytest.mark.parametrize("norm", slow_but_linf)
def test_standard(norm):
    net, x, y = official_task()
    attacked = AutoAttack(EPS[norm], norm=norm, batch_size=32).run(net, x, y)
    assert list(attacked.robust) == ["clean", *VERSIONS["standard"]]
    found = tuple(int(robust.sum()) for robust in attacked.robust.values())
    assert found[0] == 56 and found[2:] == AFTER[norm][2:]
    assert abs(found[1] - AFTER[norm][1]) <= 1
    assert standing(attacked.robust["square"]) == numbers(ROBUST[norm])
    assert torch.equal(net(attacked.x_adv).argmax(1) == y, attacked.robust["square"])
    assert (attacked.norms <= EPS[norm] * (1 + 1e-4)).all()
    assert torch.equal(attacked.norms > 0, attacked.robust["clean"] & ~attacked.robust["square"])


@pytest.mark.filterwarnings("ignore::robust_pl.callbacks.attacks.autoattack_checks.AutoAttackWarning")
@pytest.mark.parametrize("norm", slow_but_linf)
@pytest.mark.parametrize("name", VERSIONS["standard"])
def test_each_part_alone(name, norm):
    """APGD-T and FAB-T leave the same samples, CE the same but for one.

    Square leaves no more but for one: its windows are drawn for each sample, and not for the batch, and under
    linf it breaks one or two samples more.
    """
    net, x, y = official_task()
    correct = net(x).argmax(1) == y
    part = AutoAttack(EPS[norm], norm=norm).parts[name]
    x_adv = part.run(net, x[correct], y[correct], index=correct.nonzero().squeeze(1)).x_adv
    stands = correct.clone()
    stands[correct] = net(x_adv).argmax(1) == y[correct]
    more = {"apgd-ce": CE_ALONE, "square": SQUARE_ALONE}.get(name)
    expected = numbers(ROBUST[norm]) | (numbers(more[norm]) if more else set())
    found = standing(stands)
    assert len(found - expected if name == "square" else found ^ expected) <= (1 if more else 0)


@pytest.mark.filterwarnings("ignore::robust_pl.callbacks.attacks.autoattack_checks.AutoAttackWarning")
def test_rand():
    net, x, y = official_task()
    attacked = AutoAttack(EPS["linf"], version="rand").run(net, x, y)
    assert [int(robust.sum()) for robust in attacked.robust.values()] == [56, 24, 21]
    assert standing(attacked.robust["apgd-dlr"]) == numbers(ROBUST["linf"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::robust_pl.callbacks.attacks.autoattack_checks.AutoAttackWarning")
def test_plus():
    net, x, y = official_task()
    attacked = AutoAttack(EPS["linf"], version="plus").run(net, x, y)
    assert list(attacked.robust) == ["clean", *VERSIONS["plus"]]
    assert [int(robust.sum()) for robust in attacked.robust.values()] == [56, 24, 21, 21, 21, 21, 21]
    assert standing(attacked.robust["fab-t"]) == numbers(ROBUST["linf"])


# Budgets ----------------------------------------------------------------------------------------------------------


def budgets(attack):
    fields = {
        APGD: ("loss", "restarts", "steps", "n_targets", "eot_iter", "use_largereps", "rho"),
        FAB: ("n_targets", "restarts", "steps", "alpha_max", "eta", "beta"),
        Square: ("n_queries", "restarts", "p_init", "rescale_schedule"),
    }
    return {name: tuple(getattr(part, field) for field in fields[type(part)]) for name, part in attack.parts.items()}


FAB_T, SQUARE = (9, 1, 100, 0.1, 1.05, 0.9), (5000, 1, 0.8, False)


def test_budgets_of_standard():
    expected = {
        "apgd-ce": ("ce", 1, 100, 9, 1, False, 0.75),
        "apgd-t": ("dlr-targeted", 1, 100, 9, 1, False, 0.75),
        "fab-t": FAB_T,
        "square": SQUARE,
    }
    assert budgets(AutoAttack(0.1)) == budgets(AutoAttack(0.1, norm="l2")) == expected
    l1 = expected | {"apgd-ce": ("ce", 5, 100, 9, 1, True, 0.75), "apgd-t": ("dlr-targeted", 1, 100, 5, 1, True, 0.75)}
    assert budgets(AutoAttack(12, norm="l1")) == l1
    assert AutoAttack(0.1, n_targets=3).parts["fab-t"].n_targets == AutoAttack(0.1, n_targets=3).parts["apgd-t"].n_targets == 3


def test_budgets_of_the_other_versions():
    plus = {
        "apgd-ce": ("ce", 5, 100, 9, 1, False, 0.75),
        "apgd-dlr": ("dlr", 5, 100, 9, 1, False, 0.75),
        "fab": (None, 5, 100, 0.1, 1.05, 0.9),
        "square": SQUARE,
        "apgd-t": ("dlr-targeted", 1, 100, 9, 1, False, 0.75),
        "fab-t": FAB_T,
    }
    assert budgets(AutoAttack(0.1, version="plus")) == plus
    rand = {name: (loss, 1, 100, 9, 20, False, 0.75) for name, loss in (("apgd-ce", "ce"), ("apgd-dlr", "dlr"))}
    assert budgets(AutoAttack(0.1, version="rand")) == rand
    custom = AutoAttack(0.1, version="custom", attacks=["square", "apgd-ce", "fab-t"])
    assert list(custom.parts) == ["square", "apgd-ce", "fab-t"]
    assert budgets(custom) == {name: plus[name] for name in custom.parts}


# A small task -----------------------------------------------------------------------------------------------------


def small_task():
    """The first samples of the official task, in float64; a cheap custom version."""
    net, x, y = official_task()
    return copy.deepcopy(net).double(), x[:24].double(), y[:24]


def small_attack(parts=("apgd-ce", "apgd-t", "fab-t", "square"), **how):
    attack = AutoAttack(how.pop("eps", 0.006), version="custom", attacks=parts, n_targets=3, **how)
    for part in attack.parts.values():
        part.restarts = 1
        if isinstance(part, Square):
            part.n_queries = 30
        else:
            part.steps = 10
    return attack


def same(found, expected):
    assert list(found.robust) == list(expected.robust)
    for name in found.robust:
        assert torch.equal(found.robust[name], expected.robust[name]), name
    torch.testing.assert_close(found.x_adv, expected.x_adv, atol=1e-9, rtol=0)


@pytest.fixture
def small():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        yield small_task()


def test_a_call_gives_the_same_again_and_seeds_differ(small):
    attack = small_attack()
    first = attack.run(*small)
    same(attack.run(*small), first)
    same(small_attack().run(*small, index=torch.arange(24)), first)
    assert not torch.equal(small_attack(seed=1).run(*small).x_adv, first.x_adv)


def test_batches_do_not_matter(small):
    net, x, y = small
    whole = small_attack().run(net, x, y)
    assert 2 <= whole.robust["square"].sum() < whole.robust["clean"].sum()
    chunked = small_attack(batch_size=5).run(net, x, y)
    same(chunked, whole)
    assert torch.equal(chunked.forward_passes.of_each[8:], whole.forward_passes.of_each[8:])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for rows in (order[:1], order[1:10], order[10:]):
        part = small_attack().run(net, x[rows], y[rows], index=rows)
        torch.testing.assert_close(part.x_adv, whole.x_adv[rows], atol=1e-9, rtol=0)
        for name in whole.robust:
            assert torch.equal(part.robust[name], whole.robust[name][rows])


def test_no_batch_is_larger_than_it_may_be(small):
    net, x, y = small
    sizes = []
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    small_attack(("apgd-ce", "apgd-t", "square"), batch_size=6).run(net, x, y)
    assert sorted(set(sizes))[-2:] == [6, 8]  # 8 are the images of the second look at the network


def test_passes_of_samples_that_stand_and_of_those_that_fall(small):
    """Clean 1 (the first eight 2), APGD-CE 11, APGD-T 1 + 3 * 11, Square 30, and each part is judged once."""
    net, x, y = small
    attacked = small_attack(("apgd-ce", "apgd-t", "square"), eps=1e-6).run(net, x, y)
    correct = attacked.robust["clean"]
    assert torch.equal(attacked.robust["square"], correct)
    looks = 1 + (torch.arange(24) < 8)
    assert torch.equal(attacked.forward_passes.of_each, looks + correct * (11 + 34 + 30 + 3))
    assert torch.equal(attacked.backward_passes.of_each, correct * (10 + 30))
    broken = small_attack(eps=0.5).run(net, x, y)
    assert not broken.robust["apgd-ce"].any()
    cost = broken.forward_passes.of_each - looks
    assert torch.equal(cost[~correct], torch.zeros_like(cost[~correct]))
    assert ((cost[correct] >= 2) & (cost[correct] <= 4)).all()  # the start or a few steps, and the judge


def test_passes_of_standard_by_hand():
    """1 clean, 101 APGD-CE, 1 + 9 * 101 APGD-T, and 20 times as many gradients under rand."""
    net, x, y = small_task()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        attack = AutoAttack(1e-6)
        del attack.parts["fab-t"], attack.parts["square"]
        attacked = attack.run(net, x[9:12], y[9:12])
        assert attacked.forward_passes.of_each.tolist() == [2 + 101 + 910 + 2] * 3
        assert attacked.backward_passes.of_each.tolist() == [1000] * 3
        attacked = AutoAttack(1e-6, version="rand").run(net, x[9:12], y[9:12])
        assert attacked.forward_passes.of_each.tolist() == [1 + 2 * (20 * 100 + 1) + 2] * 3


class Memory(Progress):
    """Keeps parts, and stops the attack when it is asked for the part ``stop_at``."""

    def __init__(self, stop_at=None):
        self.kept, self.stop_at, self.asked, self.shown = {}, stop_at, [], []

    def recall(self, part):
        self.asked.append(part)
        if part == self.stop_at:
            raise KeyboardInterrupt
        return self.kept.get(part)

    def remember(self, part, found):
        self.kept[part] = {name: tensor.clone() for name, tensor in found.items()}

    def show(self, part, standing, done):
        self.shown.append((part, standing, done))


@pytest.mark.parametrize("stop_at", ["apgd-t", "apgd-t-1", "square"])
def test_resumed_equals_uninterrupted(stop_at, small):
    net, x, y = small
    expected = small_attack(batch_size=4).run(net, x, y)
    memory = Memory(stop_at)
    with pytest.raises(KeyboardInterrupt):
        small_attack(batch_size=4).run(net, x, y, progress=memory)
    before = set(memory.kept)
    assert "apgd-ce" in before and stop_at not in before
    memory.stop_at = None
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = small_attack(batch_size=4).run(net, x, y, progress=memory)
    same(found, expected)
    assert torch.equal(found.forward_passes.of_each, expected.forward_passes.of_each)
    assert torch.equal(found.backward_passes.of_each, expected.backward_passes.of_each)
    assert sum(seen) < expected.forwards  # what was kept is not done again
    parts = [part for part, *_ in memory.shown]
    assert {part.split("-")[0] for part in parts} <= {"apgd", "fab", "square"}
    assert all(0 <= done <= 1 and standing <= 24 for _, standing, done in memory.shown)


# What it refuses and warns of -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"version": "fast"}, "version='fast' is unknown: choose one of standard, plus, rand, custom"),
        ({"attacks": ["square"]}, r"attacks=\['square'\] and version='standard', which names its own"),
        ({"version": "custom"}, "attacks=None with version='custom': give a list of names among apgd-ce"),
        ({"version": "custom", "attacks": []}, r"attacks=\[\] with version='custom'"),
        ({"version": "custom", "attacks": "square"}, "attacks='square' with version='custom'"),
        ({"version": "custom", "attacks": ["pgd"]}, "attacks='pgd' is unknown: choose one of apgd-ce"),
        ({"version": "custom", "attacks": ["fab", "fab"]}, "names one twice"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"n_targets": 0}, "n_targets=0 must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        AutoAttack(0.1, **arguments)


def linear(classes):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    net[1].weight.data = torch.randn(classes, 16, generator=generator)
    return net, torch.rand(4, 1, 4, 4, generator=generator)


@pytest.mark.parametrize(
    ("classes", "arguments", "complaint"),
    [
        (2, {"version": "rand"}, "version='rand' runs apgd-dlr, which compares 3 logits, and the network has 2 classes: set"),
        (3, {}, "version='standard' runs apgd-t, which compares 4 logits, and the network has 3 classes: set version='custom'"),
        (9, {}, "runs apgd-t with n_targets=9, and the network has 9 classes: set n_targets=8"),
        (
            3,
            {"version": "custom", "attacks": ["fab-t"]},
            "runs fab-t with n_targets=9, and the network has 3 classes: set n_tar",
        ),
    ],
)
def test_too_few_classes(classes, arguments, complaint):
    net, x = linear(classes)
    memory = Memory()
    with pytest.raises(ValueError, match=complaint):
        AutoAttack(0.01, **arguments).run(net, x, net(x).argmax(1), progress=memory)
    assert memory.asked == []  # before any work


def test_few_classes_are_enough_with_fewer_targets():
    net, x = linear(5)
    attacked = AutoAttack(0.3, n_targets=4).run(net, x, net(x).argmax(1))
    assert not attacked.robust["square"].any()


def test_a_network_in_train_mode_is_evaluated_in_eval_mode():
    net, x = linear(4)
    net = nn.Sequential(net, nn.Dropout(0.9)).eval()
    y = net(x).argmax(1)
    net.train()
    attack = small_attack(eps=0.01)
    with pytest.warns(UserWarning, match="the network is in train mode: AutoAttack evaluates it in eval mode"):
        attacked = attack.run(net, x, y)
    assert attacked.robust["clean"].all()
    assert net.training and net[1].training
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(net, x, y)


class Noisy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.generator = net, torch.Generator().manual_seed(0)

    def forward(self, x):
        logits = self.net(x)
        return logits + 0.01 * torch.randn(logits.shape, generator=self.generator)


class Adaptive(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            torch.autograd.grad(self.net(z).logsumexp(1).sum(), z)
        return self.net(x)


@pytest.mark.parametrize(("wrapper", "flag"), [(Noisy, "randomized"), (Adaptive, "dynamic")])
def test_unusual_networks_are_reported(wrapper, flag):
    net, x = linear(4)
    with pytest.warns(AutoAttackWarning) as caught:
        small_attack(("apgd-ce",)).run(wrapper(net).eval(), x, net(x).argmax(1))
    assert [warning.message.flag for warning in caught] == [flag]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoAttack(0.001, version="rand").run(wrapper(net).eval(), x[:1], net(x[:1]).argmax(1))


def test_square_that_beats_gradients_is_reported():
    stands, falls = torch.ones(100, dtype=torch.bool), torch.arange(100) > 0
    with pytest.warns(AutoAttackWarning, match=r"square lowers the robust accuracy from 100.00% to 99.00%") as caught:
        warn_of_square({"clean": stands, "apgd-ce": stands, "square": falls})
    assert caught[0].message.flag == "square"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_square({"clean": stands, "apgd-ce": falls, "square": falls})
        warn_of_square({"clean": stands, "square": falls})


# The faster network -----------------------------------------------------------------------------------------------


def test_a_faster_network_is_attacked_and_the_network_itself_judges(monkeypatch):
    """The same verdicts; and nothing is left changed."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.rand(6, 1, 8, 8, generator=generator)
    y, seen = net(x).argmax(1), []

    def spy(model, **how):
        seen.append(Folded(model, **how))
        return seen[-1]

    monkeypatch.setattr("robust_pl.callbacks.attacks.base.Folded", spy)
    before = copy.deepcopy(net.state_dict())
    attacks = [small_attack(eps=0.02, fold_batchnorm=fold, channels_last=fold) for fold in (True, False)]
    fast, plain = (attack.run(net, x, y) for attack in attacks)
    assert len(seen) == 1 and seen[0].fold
    for name in plain.robust:
        assert torch.equal(fast.robust[name], plain.robust[name])
    assert torch.equal(net(fast.x_adv).argmax(1) == y, fast.robust["square"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
