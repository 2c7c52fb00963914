"""AW-Net: gates are filters of each image's own, it starts as the given network, and AWMTARD trains each half with its own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_pl.callbacks.monitors.passes import EVALUATION, PassCounter
from robust_pl.nets import AWNet, DualBatchNorm, PreActResNet18, ResNet18, SmallCNN, TrainedNet
from robust_pl.nets.aw_net import GatedConv, Router, gate_convolutions

from .test_dual_norm import randomised


def aw_net(width: int = 4, **settings: Any) -> AWNet:
    torch.manual_seed(0)
    return AWNet(SmallCNN(width=width), in_channels=1, width=4, dim=8, **settings)


def awake(net: AWNet, seed: int = 0) -> AWNet:
    """Gates and shares that follow the image, and BatchNorm halves that differ."""
    randomised(net, seed)
    for linear in (*net.router.heads, net.router.adversarial):
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
    return net


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: SmallCNN(width=4), lambda: PreActResNet18(in_channels=1)], ids=["small", "preact"])
@pytest.mark.parametrize("training", [False, True])
def test_it_starts_as_the_given_network_bit_for_bit(build: Callable[[], nn.Module], training: bool) -> None:
    plain, x = randomised(build()).train(training), torch.rand(4, 1, 8, 8)
    net = AWNet(deepcopy(plain), in_channels=1).train(training)
    signals = net.signals(x)
    assert torch.equal(signals[:, :-1], torch.ones(4, signals.shape[1] - 1))
    assert torch.equal(net.share(signals), torch.full((4,), 0.5))
    assert torch.equal(net.routed(x, signals, 0.0), plain(x))
    if not training:  # p = 0 that is only known from the signals mixes both halves, and gives the same
        hard = torch.cat([signals[:, :-1], torch.zeros(4, 1)], 1)
        assert torch.equal(net.routed(x, hard), plain(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_is_a_filter_of_each_image(bias: bool) -> None:
    """In float64 against a convolution for each image, with its own filters W_l^(i) = g_l^(i) W_l."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias)).double()
    net = deepcopy(plain)
    gates, sizes = gate_convolutions(net)
    assert sizes == [5] and isinstance(net[0], nn.Conv2d) and isinstance(net[1], GatedConv)
    x, g = torch.rand(4, 2, 7, 7, dtype=torch.float64), 2 * torch.rand(4, 5, dtype=torch.float64)
    with gates.use(g):
        found = net(x)
    conv = plain[1]
    for i in range(4):
        filters = g[i, :, None, None, None] * conv.weight
        by_hand = F.conv2d(plain[0](x[i : i + 1]), filters, conv.bias, stride=2, padding=1)
        assert torch.allclose(found[i : i + 1], by_hand, atol=1e-12, rtol=0)
    assert torch.equal(net(x), plain(x)) and gates.values is None
    with gates.use(torch.ones_like(g)):
        assert torch.equal(net(x), plain(x))


def test_a_whole_network_of_filters_of_each_image() -> None:
    """Every image through a plain network whose filters and BatchNorms were replaced by its own, in float64."""
    net, x = awake(aw_net()).double().eval(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    signals = net.signals(x)
    for share, half in ((0.0, "clean"), (1.0, "adv")):
        for i in range(3):
            plain = SmallCNN(width=4).double().eval()
            plain.linear.load_state_dict(net.net.linear.state_dict())
            for place, layer in enumerate(net.net.layers):
                own = plain.layers[place]
                if isinstance(layer, DualBatchNorm):
                    own.load_state_dict(getattr(layer, half).state_dict())
                elif isinstance(layer, GatedConv):
                    own.weight.data.copy_(signals[i, layer.columns, None, None, None] * layer.conv.weight)
                elif isinstance(layer, nn.Conv2d):
                    own.load_state_dict(layer.state_dict())
            found = net.routed(x, signals, share)[i]
            assert torch.allclose(found, plain(x[i : i + 1])[0], atol=1e-12, rtol=0)


def test_where_gates_are() -> None:
    """3 x 3 convolutions of the blocks: neither the stem nor 1 x 1 shortcuts, in every image's columns once."""
    net = AWNet(ResNet18())
    gated = {name: m for name, m in net.net.named_modules() if isinstance(m, GatedConv)}
    assert list(gated) == [f"layer{stage}.{block}.conv{i}" for stage in range(1, 5) for block in range(2) for i in (1, 2)]
    assert sorted(c for m in gated.values() for c in range(m.columns.start, m.columns.stop)) == list(range(3840))
    assert [head.out_features for head in net.router.heads] == [m.conv.out_channels for m in gated.values()]
    assert net.signals(torch.rand(2, 3, 32, 32)).shape == (2, 3841)
    small = aw_net()
    assert [name for name, m in small.net.named_modules() if isinstance(m, GatedConv)] == ["layers.3", "layers.6", "layers.9"]


def test_gates_and_shares_lie_in_their_ranges() -> None:
    net, x = awake(aw_net()).eval(), torch.rand(16, 1, 8, 8)
    signals = net.signals(x)
    gates, p = signals[:, :-1], net.share(signals)
    assert gates.min() > 0 and gates.max() < 2 and gates.std(0).min() > 1e-4
    assert p.min() > 0 and p.max() < 1 and p.std() > 0
    z = net.router.layers(x)
    by_hand = torch.cat([2 * torch.sigmoid(z @ head.weight.T + head.bias) for head in net.router.heads], 1)
    assert torch.allclose(gates, by_hand, atol=1e-6)
    assert torch.allclose(net.forward_features(x) @ net.net.linear.weight.T + net.net.linear.bias, net(x), atol=1e-6)


def test_an_attack_sees_router_gates_and_shares() -> None:
    """The gradient by the image is that of finite differences, and not that with signals that stay."""
    net = awake(aw_net()).double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        return net(x).logsumexp(1).sum()

    (gradient,) = torch.autograd.grad(output(x.requires_grad_()), x)
    held = net.routed(x, net.signals(x).detach()).logsumexp(1).sum()
    (still,) = torch.autograd.grad(held, x)
    x, h, direction = x.detach(), 1e-6, torch.randn_like(x)
    measured = (output(x + h * direction) - output(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), measured, rtol=1e-5)
    assert not torch.allclose(gradient, still, rtol=1e-2)


def test_a_hard_share_moves_one_half_alone() -> None:
    net, x = awake(aw_net()).train(), torch.rand(8, 1, 8, 8)
    for share, stays in ((0.0, "adv"), (1.0, "clean")):
        before = {name: b.clone() for name, b in net.named_buffers() if name.startswith("net.")}
        net.routed(x, net.signals(x), share)
        for name, buffer in net.named_buffers():
            if name.startswith("net."):
                assert torch.equal(buffer, before[name]) == (f".{stays}." in name), name


def test_copies_have_gates_of_their_own() -> None:
    net, x = awake(aw_net()).eval(), torch.rand(4, 1, 8, 8)
    twin = deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert twin.gates is not net.gates and all(m.gates is twin.gates for m in twin.modules() if isinstance(m, GatedConv))
    with net.gates.use(torch.zeros(4, 20)):
        assert torch.equal(twin(x), net(x))  # which both read what their own routers say
    twin.load_state_dict(awake(deepcopy(net), seed=1).state_dict())
    assert not torch.equal(twin(x), net(x))


def test_compiled() -> None:
    net, x = awake(aw_net()).eval(), torch.rand(4, 1, 8, 8)
    expected = net(x)
    assert torch.allclose(torch.compile(net, backend="aot_eager")(x), expected, atol=1e-6)


def test_passes_are_counted_in_the_network_and_not_in_its_router() -> None:
    net, x = aw_net().eval(), torch.rand(4, 1, 8, 8)
    counter = PassCounter(net, lambda: EVALUATION)
    net(x)  # the first call is measured and counted from here on
    net(x)
    signals = net.signals(x)
    net.routed(x, signals, 0.0)
    before = counter.tallies[EVALUATION].forwards
    net.routed(x, signals, 1.0)
    assert counter.tallies[EVALUATION].forwards - before == 4
    net.signals(x)
    assert counter.tallies[EVALUATION].forwards - before == 4
    counter.remove()


def test_it_starts_from_a_trained_network(ingredients: Path) -> None:
    trained, x = TrainedNet(str(ingredients / "base")), torch.rand(4, 1, 8, 8)
    expected = trained(x)
    net = AWNet(trained, in_channels=1).eval()
    assert torch.equal(net.routed(x, net.signals(x), 0.0), expected)


def test_bad_networks() -> None:
    with pytest.raises(ValueError, match="no 3 x 3 convolution"):
        AWNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="no BatchNorm"):
        AWNet(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    with pytest.raises(ValueError, match="convert a network once"):
        AWNet(aw_net())
    assert Router([3], 1)(torch.rand(2, 1, 8, 8)).shape == (2, 4)
