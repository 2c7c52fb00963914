"""Networks that are folded give the same, and those that must not be folded are left alone."""

import copy

import pytest
import torch
from torch import nn

from robust_pl import nets
from robust_pl.callbacks import PGD
from robust_pl.methods import PGDAT
from robust_pl.nets.folding import Folded, folded


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


def left(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def fold(net, x, **how):
    with torch.no_grad():
        return folded(net, x[:2], net(x[:2]), **how)


@pytest.fixture
def x():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "remaining"), [(nets.ResNet20, 0), (nets.ResNet2B, 0), (nets.PreActResNet18, 9), (nets.SmallCNN, 0)]
)
def test_the_copy_gives_the_same_logits_and_gradients(make, remaining, x):
    torch.manual_seed(0)
    net = lively(make(in_channels=3) if make is not nets.ResNet2B else make())
    state = copy.deepcopy(net.state_dict())
    faster = fold(net, x)
    assert isinstance(faster, Folded)
    assert left(faster) == min(remaining, left(net))
    results = []
    for model in (net, faster):
        z = x.clone().requires_grad_()
        logits = model(z)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), z)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5 * max(1.0, expected.abs().max().item()), rtol=0)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_frozen_parameters_make_no_difference(x):
    faster = fold(lively(nets.ResNet20()).requires_grad_(False), x)
    assert isinstance(faster, Folded) and left(faster) == 0


def test_channels_last_alone(x):
    faster = fold(lively(nets.ResNet20()), x, fold=False)
    assert isinstance(faster, Folded) and left(faster) == 19
    assert faster.net.conv1.weight.is_contiguous(memory_format=torch.channels_last)


class Mine(nn.Sequential):
    """Somebody else's module."""


def hooked(net):
    net[0].register_forward_hook(lambda *given: None)
    return net


def overridden(net):
    net[0].forward = net[0].forward
    return net


def training(net):
    net[1].train()
    return net


def parametrised(net):
    nn.utils.parametrizations.weight_norm(net[0])
    return net


@pytest.mark.parametrize("change", [lambda net: Mine(*net), hooked, overridden, training, parametrised])
def test_what_is_not_known_is_left_alone(change):
    x, net = torch.rand(2, 1, 8, 8), change(small())
    with torch.no_grad():
        assert folded(net, x, net(x)) is net


def test_a_copy_that_disagrees_is_not_used():
    x, net = torch.rand(2, 1, 8, 8), small()
    with torch.no_grad():
        assert isinstance(folded(net, x, net(x)), Folded)
        assert folded(net, x, net(x) + 1e-3) is net


class Forked(nn.Module):
    """Goes on with what the convolution returned, too; made to look like one of the library's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x):
        z = self.conv(x)
        return self.last((self.norm(z) + z).flatten(1))


Forked.__module__ = "robust_pl.nets.forked"


def test_a_convolution_that_others_read_is_not_folded():
    faster = fold(lively(Forked()), torch.rand(2, 1, 8, 8))
    assert isinstance(faster, Folded) and left(faster) == 1


def test_a_convolution_whose_output_is_changed_in_place_is_not_folded():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    faster = fold(lively(net), torch.rand(2, 1, 8, 8))
    assert isinstance(faster, Folded) and left(faster) == 1


def test_a_layer_that_runs_twice_is_not_folded():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    net = lively(nn.Sequential(conv, nn.BatchNorm2d(1), conv, nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3)))
    faster = fold(net, torch.rand(2, 1, 8, 8))
    assert isinstance(faster, Folded) and left(faster) == 2


def test_a_method_is_its_network():
    net = lively(nets.ResNet20())
    method = PGDAT(net, PGD()).eval()
    x = torch.rand(2, 3, 32, 32)
    faster = fold(method, x)
    assert isinstance(faster, Folded) and left(faster) == 0
    assert not any(isinstance(module, type(method)) for module in faster.modules())
