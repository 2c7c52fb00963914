"""APGD against the method written down a second time for one sample, and its passes against hand counts."""

import pytest
import torch
from torch import nn

from robust_pl.callbacks import APGD
from robust_pl.callbacks.attacks import apgd
from robust_pl.callbacks.attacks.apgd_walk import MomentumWalk, SparseWalk
from robust_pl.callbacks.attacks.autoattack_checks import AutoAttackWarning
from robust_pl.functional import geometry, losses


class Toy(nn.Module):
    """Two layers on images (3, 4, 4) of five classes; nobody is sure of anything."""

    def __init__(self, classes=5, scale=3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(scale * torch.randn(16, 48, generator=generator, dtype=torch.float64) / 48**0.5)
        self.last = nn.Parameter(torch.randn(classes, 16, generator=generator, dtype=torch.float64) / 4)

    def forward(self, x):
        return torch.tanh((x.flatten(1) - 0.5) @ self.first.T) @ self.last.T


def images(count=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    x[0] = x[0].round()  # a black and white image, at the corners of the box
    return x


class Noise:
    """Draws that are known beforehand."""

    def __init__(self, noise):
        self.noise = noise

    def uniform(self, like):
        return self.noise

    normal = uniform

    def rows(self, rows):
        return Noise(self.noise[rows])

    def fork(self, key):
        return self


def reference(loss, x, noise, eps, norm, steps):
    """APGD as the papers and the public code have it, for one image; returns the place of the largest loss."""

    def value_and_gradient(x_adv):
        x_adv = x_adv.clone().requires_grad_()
        value = loss(x_adv)
        return value.item(), torch.autograd.grad(value, x_adv)[0]

    def project(x_adv):
        return geometry.project(x_adv, x, eps, norm)

    if norm == "l1":
        x_adv, step, window = project(x + noise), eps, max(int(0.04 * steps), 1)
        density, changed_before = 0.2, x.numel()
    else:
        delta = 2 * noise - 1 if norm == "linf" else noise
        x_adv, step, window = project(x + eps * delta / geometry.size(delta, norm)), 2 * eps, max(int(0.22 * steps), 1)
    value, gradient = value_and_gradient(x_adv)
    best = checked = value
    x_best, gradient_best, x_old, table, halved, since = x_adv, gradient, x_adv, [0.0] * steps, True, 0
    for i in range(steps):
        momentum, x_old = x_adv - x_old, x_adv
        if norm == "l1":
            rank = min(max(int((1 - density) * x.numel()), 0), x.numel() - 1)
            signs = (gradient * (gradient.abs() >= gradient.abs().flatten().sort()[0][rank])).sign()
            x_adv = project(x_adv + step * signs / (signs.abs().sum() + 1e-10))
        else:
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            share = 0.75 if i else 1.0
            x_adv = project(x_adv + share * (project(x_adv + step * direction) - x_adv) + (1 - share) * momentum)
        value, gradient = value_and_gradient(x_adv)
        table[i] = value
        if value > best:
            x_best, gradient_best, best = x_adv, gradient, value
        since += 1
        if since < window:
            continue
        if norm == "l1":
            changed = (x_best != x).sum().item()
            back = changed / changed_before < 0.95
            step, density, changed_before = eps if back else max(step / 1.5, eps / 10), changed / x.numel() / 1.5, changed
        else:
            rises = sum(table[i - j] > table[i - j - 1] for j in range(window))
            back = rises <= 0.75 * window or (not halved and checked >= best)
            halved, checked, step = back, best, step / 2 if back else step
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        if back:
            x_adv, gradient = x_best, gradient_best
        since = 0
    return x_best


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.05), ("l1", 0.2)])
def test_the_walk_is_that_of_the_paper(loss, norm, eps, monkeypatch):
    """On samples that stand: those are the ones for which all steps are walked."""
    net, x = Toy(), images()
    y = net(x).argmax(1)
    generator = torch.Generator().manual_seed(2)
    noise = (torch.rand if norm == "linf" else torch.randn)(x.shape, generator=generator, dtype=x.dtype)
    attack = APGD(eps, norm=norm, loss=loss, steps=40)
    monkeypatch.setattr(attack, "_draws", lambda *given: Noise(noise))
    x_adv = attack(net, x, y)
    standing = (net(x_adv).argmax(1) == y).nonzero().flatten().tolist()
    assert len(standing) >= 3
    function = getattr(losses, {"ce": "cross_entropy"}.get(loss, loss))
    for i in standing:
        expected = reference(lambda z, y=y[i]: function(net(z), y[None])[0], x[i : i + 1], noise[i : i + 1], eps, norm, 40)
        torch.testing.assert_close(x_adv[i : i + 1], expected, atol=1e-8, rtol=0)


def test_checkpoints():
    """After which of 100 steps the official code looks back."""
    assert MomentumWalk.windows(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert MomentumWalk.windows(1) == {1: 1}
    assert SparseWalk.windows(100) == dict.fromkeys(range(4, 101, 4), 4)
    assert SparseWalk.windows(30) == dict.fromkeys(range(1, 31), 1)


# Passes -----------------------------------------------------------------------------------------------------------


def passes(attack, net, x, y):
    attacked = attack.run(net, x, y)
    return attacked.forward_passes.of_each.tolist(), attacked.backward_passes.of_each.tolist()


@pytest.mark.parametrize(
    ("arguments", "forwards", "backwards"),
    [
        ({}, 101, 100),
        ({"loss": "dlr", "restarts": 3}, 303, 300),
        ({"loss": "dlr-targeted", "n_targets": 4}, 1 + 4 * 101, 4 * 100),
        ({"loss": "dlr-targeted", "n_targets": 1, "restarts": 2}, 1 + 2 * 101, 2 * 100),
        ({"norm": "l1", "use_largereps": True}, 31 + 31 + 41, 100),
        ({"steps": 5, "eot_iter": 4}, 4 + 4 * 4 + 1, 4 + 4 * 4),
    ],
)
def test_passes_of_a_sample_that_nothing_breaks(arguments, forwards, backwards):
    net, x = Toy(), images()
    y = net(x).argmax(1)
    assert passes(APGD(1e-6, **arguments), net, x, y) == ([forwards] * len(x), [backwards] * len(x))


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_a_sample_broken_at_once_costs_one_look(loss):
    """Those that are misclassified as they are; the others cost what they cost alone."""
    net, x = Toy(), images()
    y = net(x).argmax(1)
    y[::2] = (y[::2] + 1) % 5
    forwards, backwards = passes(APGD(1e-6, loss=loss, n_targets=3, steps=10), net, x, y)
    look = 1 + (loss == "dlr-targeted")
    assert forwards[::2] == [look] * 3 and backwards[::2] == [1] * 3
    assert forwards[1::2] == [1 + 33 if look == 2 else 11] * 3


def test_targets_run_side_by_side_in_pieces_that_fit():
    net, x = Toy(), images()
    y, sizes = net(x).argmax(1), []
    hook = net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    alone = APGD(0.05, loss="dlr-targeted", n_targets=4, steps=10)
    x_adv = alone.run(net, x, y, index=torch.arange(6)).x_adv
    hook.remove()
    assert max(sizes) == 6  # six samples fit, so three copies of two each
    parts = [alone.run(net, x[i : i + 1], y[i : i + 1], index=torch.tensor([i])).x_adv for i in range(6)]
    torch.testing.assert_close(torch.cat(parts), x_adv, atol=1e-9, rtol=0)


# What it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", geometry.NORMS)
def test_what_is_found_first_is_kept(norm):
    """An image that fools the network, although its loss may be smaller than that of others."""
    net, x = Toy(), images()
    y = net(x).argmax(1)
    eps = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
    attacked = APGD(eps, norm=norm, restarts=2).run(net, x, y)
    fooled = net(attacked.x_adv).argmax(1) != y
    assert 2 <= fooled.sum() < 6 or fooled.all()
    assert (attacked.forward_passes.of_each[fooled] < 202).all()
    assert (attacked.forward_passes.of_each[~fooled] == 202).all()


@pytest.mark.parametrize("norm", geometry.NORMS)
def test_a_gpu_that_is_seldom_looked_at_finds_the_same(norm, monkeypatch):
    net, x = Toy(), images()
    y = net(x).argmax(1)
    attack, index = APGD({"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm], norm=norm), torch.arange(6)
    often = attack.run(net, x, y, index=index)
    monkeypatch.setitem(apgd._GLANCE, "cpu", 8)
    seldom = attack.run(net, x, y, index=index)
    assert torch.equal(often.x_adv, seldom.x_adv)
    more = seldom.forward_passes.of_each - often.forward_passes.of_each
    assert 0 < more.max() < 8 and more.min() >= 0


def test_a_random_network_keeps_its_samples():
    """Under eot_iter nobody leaves, since a verdict may be luck; the last image that fooled the network is returned."""
    net, x = Toy(), images()
    y = (net(x).argmax(1) + 1) % 5
    assert passes(APGD(1e-6, steps=5, eot_iter=2), net, x, y) == ([11] * 6, [10] * 6)


def test_targets_are_the_likeliest_wrong_classes():
    net, x = Toy(), images()
    y = net(x).argmax(1)
    seen = []

    def spy(logits, y, target):
        seen.append(target)
        return losses.margin(logits, y)

    patched = pytest.MonkeyPatch()
    patched.setattr(losses, "dlr_targeted", spy)
    try:
        APGD(1e-6, loss="dlr-targeted", n_targets=3, steps=1)(net, x, y)  # three looks at the loss in each run
    finally:
        patched.undo()
    ranked = net(x).argsort(1, descending=True)
    assert torch.equal(seen[0], ranked[:, 1])
    assert torch.equal(torch.cat([t.view(2, -1).T for t in seen[3::3]]), ranked[:, 2:4])


# What it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"loss": "cw"}, "loss='cw' is unknown: choose one of ce, dlr, dlr-targeted"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"n_targets": 0}, "n_targets=0 must be"),
        ({"eot_iter": 1.5}, "eot_iter=1.5 must be"),
        ({"rho": 1.2}, r"rho=1.2 must lie in \(0, 1\]"),
        ({"use_largereps": True}, "use_largereps=True needs norm='l1'"),
        ({"restarts": 0}, "restarts=0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        APGD(0.1, **arguments)


@pytest.mark.parametrize(
    ("classes", "loss", "complaint"),
    [
        (2, "dlr", "loss='dlr' needs at least 3 classes and the network has 2: choose 'ce'"),
        (3, "dlr-targeted", "loss='dlr-targeted' needs at least 4 classes and the network has 3: choose 'ce'"),
        (5, "dlr-targeted", "n_targets=9 is too many: the network has 5 classes, so set n_targets to at most 4"),
    ],
)
def test_too_few_classes(classes, loss, complaint):
    x = images()
    with pytest.raises(ValueError, match=complaint):
        APGD(0.1, loss=loss)(Toy(classes), x, torch.zeros(6, dtype=torch.int64))


def test_vanishing_gradients_are_reported():
    net, x = Toy(scale=0.0), images()
    with pytest.warns(AutoAttackWarning, match="6 of 6 samples have no gradient") as caught:
        APGD(0.1, loss="dlr", steps=2)(net, x, torch.zeros(6, dtype=torch.int64))
    assert caught[0].message.flag == "zero-gradient"
