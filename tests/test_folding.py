"""Networks that are folded give the same, and those that must not be folded are left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_pl import nets
from robust_pl.callbacks import PGD
from robust_pl.methods import PGDAT
from robust_pl.nets.epilogue import Shifted
from robust_pl.nets.folding import Folded, look_at


@pytest.fixture(autouse=True)
def exact():
    """In float64, since in float32 rounding moves some ReLU across its corner."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(net, seed=0):
    """Statistics and scales as after training, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return net.eval()


def small():
    return lively(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))


def gradient(model, x):
    z = x.clone().requires_grad_()
    logits = model(z)
    return logits, *torch.autograd.grad(logits.square().sum(), z)


def agree(net, x, faster=None):
    for found, expected in zip(gradient(faster or Folded(net), x), gradient(net, x), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5 * max(1.0, expected.abs().max().item()), rtol=0)


@pytest.fixture
def x():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "pairs"), [(nets.ResNet20, 19), (nets.ResNet2B, 6), (nets.PreActResNet18, 8), (nets.SmallCNN, 4)]
)
def test_the_same_logits_and_gradients(make, pairs, x):
    net = lively(make(in_channels=3) if make is not nets.ResNet2B else make())
    state = copy.deepcopy(net.state_dict())
    agree(net, x)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(look_at(net, x).pairs) == min(pairs, len(norms))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("make", [nets.ResNet20, nets.ResNet18, nets.PreActResNet18, nets.SmallCNN, nets.WideResNet])
def test_a_bias_may_come_late(make, x):
    net = lively(make(in_channels=3) if make is not nets.WideResNet else make(depth=10, widen_factor=1))
    agree(net, x[:2], Folded(net, late_bias=True))


def test_a_late_bias_is_a_tensor_to_everybody_else():
    y, r, bias = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    whole = y + bias.view(-1, 1, 1)
    for found, expected in (
        (Shifted((y,), bias).relu(), whole.relu()),
        (torch.relu(Shifted((y,), bias) + r), (whole + r).relu()),
        (nn.ReLU(inplace=True)(r + Shifted((y,), bias)), (whole + r).relu()),
        ((Shifted((y,), bias) + Shifted((r,), bias)).relu(), (whole + r + bias.view(-1, 1, 1)).relu()),
        (torch.relu(torch.add(r, Shifted((y,), bias))), (whole + r).relu()),
        (Shifted((y,), bias) + 1, whole + 1),
        (nn.functional.gelu(Shifted((y,), bias)), nn.functional.gelu(whole)),
        (Shifted((y,), bias).mean((2, 3)), whole.mean((2, 3))),
        (torch.cat([r, Shifted((y,), bias)]), torch.cat([r, whole])),
    ):
        torch.testing.assert_close(found, expected)


def inplace_relu(z, r):
    F.relu(z, inplace=True)
    return z + r


def called_relu_(z, r):
    z.relu_()
    return z * 2


def grown(z, r):
    same = z
    z += r
    return same + z


def grown_by_another_dtype(z, r):
    z += r.float()
    return z


def scaled(z, r):
    z *= 2
    z.add_(r)
    return z - 1


def cut(z, r):
    z[:, 1] = r[:, 0]
    return -z[:, :2] / 2


def later_changed(z, r):
    later = z + 0
    total = z + later
    z.mul_(3)
    return total.relu()


def looked_at_without_gradients(z, r):
    with torch.no_grad():
        scale, part = z.mean(), z + r
    return (z * scale).relu() + part.relu()


TENSOR_USES = [inplace_relu, called_relu_, grown, grown_by_another_dtype, scaled, cut, later_changed]
TENSOR_USES += [looked_at_without_gradients, lambda z, r: 1 - z, lambda z, r: r @ z, lambda z, r: (z > 0) * z]


@pytest.mark.parametrize("use", TENSOR_USES)
def test_a_late_bias_changes_in_place_and_calculates_as_a_tensor_does(use):
    found = []
    for make in (lambda z, bias: Shifted((z,), bias), lambda z, bias: z + bias.view(-1, 1, 1)):
        generator = torch.Generator().manual_seed(0)
        z, r = (torch.randn(2, 3, 4, 4, generator=generator).requires_grad_() for _ in range(2))
        made = make(z * 1, torch.randn(3, generator=generator))
        result = use(made, r * 1)
        result = result.whole() if type(result) is Shifted else result
        found.append((result.detach(), *torch.autograd.grad(result.square().sum(), (z, r), allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_a_late_bias_hears_of_what_it_waits_for():
    z, r = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total = Shifted((z,), torch.ones(3)) + r
    r.zero_()
    with pytest.raises(RuntimeError, match="what a sum waits for was changed in place"):
        total.relu()


def test_half_precision_is_that_of_the_pass(x):
    net, x = lively(nets.ResNet20()).float(), x.float()
    faster = Folded(net)
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            half, expected = faster(x), net(x)
        assert half.dtype == torch.bfloat16
        assert (half - exact).abs().max() < 2 * (expected - exact).abs().max()


def test_weights_that_moved_are_folded_anew(x):
    net = lively(nets.ResNet20())
    agree(net, x)
    lively(net, seed=1)
    agree(net, x)


def test_images_of_another_shape(x):
    net = lively(nets.ResNet20())
    faster = Folded(net)
    for images in (x, x[:, :, :16, :24]):
        agree(net, images, faster)


def test_nobody_counts_the_look(x):
    net, seen = lively(nets.ResNet20()), []
    net.register_forward_hook(lambda *given: seen.append(1))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    Folded(net)(x)
    assert len(seen) == 1 and torch.equal(torch.rand(3), expected)


def folds(net, x):
    """How many convolutions are folded in a pass: as many BatchNorms do nothing."""
    asked = []
    original = nn.functional.batch_norm
    try:
        nn.functional.batch_norm = lambda *given, **how: asked.append(1) or original(*given, **how)
        look_at(net, x)
        asked.clear()
        Folded(net)(x)
    finally:
        nn.functional.batch_norm = original
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) - len(asked)


class Mine(nn.Sequential):
    """Somebody else's module."""


def test_a_users_own_network_is_folded():
    x, net = torch.rand(2, 1, 8, 8), Mine(*small()).eval()
    assert folds(net, x) == 1
    agree(net, x)


def hooked(net):
    net[0].register_forward_hook(lambda *given: None)


def overridden(net):
    net[0].forward = net[0].forward


def training(net):
    net[1].train()


def parametrised(net):
    nn.utils.parametrizations.weight_norm(net[0])


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("change", [hooked, overridden, training, parametrised])
def test_what_does_more_than_its_arithmetic_is_left_alone(change, later):
    x, net = torch.rand(2, 1, 8, 8), small()
    if later:
        Folded(net)(x)
    change(net)
    assert folds(net, x) == 0
    if change is not training:  # whose statistics move
        agree(net, x)


def test_hooks_that_only_count_do_not_hinder():
    x, net, seen = torch.rand(2, 1, 8, 8), small(), []

    def count(*given):
        seen.append(1)

    count.counts_only = True
    net[0].register_forward_hook(count)
    assert folds(net, x) == 1 and len(seen) == 1


class Forked(nn.Module):
    """Goes on with what the convolution returned, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x):
        z = self.conv(x)
        return self.last((self.norm(z) + z).flatten(1))


def test_a_convolution_that_others_read_is_not_folded():
    net, x = lively(Forked()), torch.rand(2, 1, 8, 8)
    assert folds(net, x) == 0
    agree(net, x)


def test_a_convolution_whose_output_is_changed_in_place_is_not_folded():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    assert folds(lively(net), torch.rand(2, 1, 8, 8)) == 0
    agree(net, torch.rand(2, 1, 8, 8))


def test_a_layer_that_runs_twice_is_not_folded():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    net = lively(nn.Sequential(conv, nn.BatchNorm2d(1), conv, nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3)))
    assert folds(net, torch.rand(2, 1, 8, 8)) == 0


class Routed(nn.Module):
    """Goes one way or the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms, self.last = nn.Conv2d(1, 4, 3), nn.ModuleList(), nn.Linear(144, 3)
        self.norms.extend([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.way = 0

    def forward(self, x):
        return self.last(self.norms[self.way](self.conv(x)).flatten(1))


def test_a_network_that_goes_another_way_is_asked_as_it_is():
    net, x = lively(Routed()), torch.rand(2, 1, 8, 8)
    faster = Folded(net)
    agree(net, x, faster)
    for way in (1, 0):  # where it is looked at anew, and folded as it goes then
        net.way = way
        agree(net, x, faster)
        agree(net, x)
        assert [norm() for _, norm, _ in look_at(net, x).pairs] == [net.norms[way]]


class Flat(nn.Module):
    """Cuts its input up by view(), which wants it contiguous."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x):
        z = x.view(len(x), 12, 4, 4)
        return self.last(self.norm(self.conv(z)).flatten(1))


def test_a_network_that_cannot_take_channels_last_is_shown_contiguous_images():
    net, x = lively(Flat()), torch.rand(3, 3, 8, 8)
    assert not look_at(net, x).channels_last and folds(net, x) == 1
    agree(net, x)


def test_recomputed_activations_are_those_of_the_first_pass():
    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    net, x = lively(Recomputing()), torch.rand(2, 1, 8, 8)
    agree(net, x)


def test_a_method_is_its_network(x):
    method = PGDAT(lively(nets.ResNet20()), PGD()).eval()
    assert folds(method, x) == 19
    agree(method, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_finds_the_same(norm, x):
    """Without the sign, which flips where a gradient vanishes, images agree; with it, losses and verdicts do."""
    net, x = lively(nets.ResNet20()).float(), x.float()
    y = net(x).argmax(1)
    plain = PGD(2 / 255 if norm == "linf" else 0.1, steps=5, norm=norm, random_start=False)
    fast = copy.deepcopy(plain)
    plain.fold_batchnorm = plain.channels_last = False
    found, expected = fast(net, x, y), plain(net, x, y)
    if norm == "l2":
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    losses = [nn.functional.cross_entropy(net(images), y, reduction="none") for images in (found, expected)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    assert torch.equal(net(found).argmax(1), net(expected).argmax(1))
    assert found.is_contiguous() and plain.forwards == fast.forwards == 20
