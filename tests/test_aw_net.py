"""AW-Net: gates are filters of each image's own, it starts as the given network, and AWMTARD trains each half with its own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from robust_pl.callbacks import EMA, PGD
from robust_pl.callbacks.monitors.passes import EVALUATION, PassCounter
from robust_pl.methods import AWMTARD
from robust_pl.methods.distillation.mtard import TwiceTaughtExample
from robust_pl.nets import AWNet, DualBatchNorm, PreActResNet18, ResNet18, SmallCNN, TrainedNet
from robust_pl.nets.aw_net import GatedConv, Router, gate_convolutions

from .test_dual_norm import randomised
from .test_methods import QUIET, loader, sgd


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
    trained, x = TrainedNet(str(ingredients / "base")).eval(), torch.rand(4, 1, 8, 8)
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


# Its training ---------------------------------------------------------------------------------------------------------


def teachers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    return SmallCNN(width=4), SmallCNN(width=4)


def aw_mtard(net: nn.Module | None = None, **settings: Any) -> AWMTARD:
    robust, clean = teachers()
    torch.manual_seed(0)
    attack = settings.pop("attack", None) or PGD(eps=0.2, steps=2)
    return AWMTARD(net or aw_net(), robust, clean, attack, optimizer=sgd, **settings)


def fit(method: AWMTARD, epochs: int = 1, **more: Any) -> Trainer:
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET, **more)
    trainer.fit(method, loader())
    return trainer


def test_the_loss_by_hand() -> None:
    """In float64: half the divergence from each teacher, at the first step, and a tenth of the router's cross-entropies."""
    method = aw_mtard(awake(aw_net())).double().eval()
    robust, clean = (teacher.double().eval() for teacher in teachers())
    generator = torch.Generator().manual_seed(1)
    x, x_adv = (torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    example = TwiceTaughtExample(
        x,
        torch.zeros(4, dtype=torch.int64),
        torch.arange(4),
        x_adv,
        teacher_logits_adv=robust(x_adv),
        clean_teacher_logits=clean(x),
    )
    method.lr_factor = lambda: 1.0
    net = method.net

    def divergence(teacher: Tensor, student: Tensor) -> Tensor:
        p = teacher.softmax(1)
        return (p * (p.log() - student.log_softmax(1))).sum(1).mean()

    with net.gates.use(net.signals(x)[:, :-1]), net.routing.use(0.0):
        of_clean = divergence(clean(x), net.net(x))
    with net.gates.use(net.signals(x_adv)[:, :-1]), net.routing.use(1.0):
        of_robust = divergence(robust(x_adv), net.net(x_adv))
    p, p_adv = net.share(net.signals(x)), net.share(net.signals(x_adv))
    by_hand = 0.5 * of_clean + 0.5 * of_robust + 0.1 * (-(1 - p).log().mean() - p_adv.log().mean())
    assert torch.allclose(method.loss(example), by_hand, atol=1e-8, rtol=0)
    method.router_weight = 0.0
    assert torch.allclose(method.loss(example), 0.5 * of_clean + 0.5 * of_robust, atol=1e-8, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_every_weight_has_a_gradient_in_every_step(weight: float) -> None:
    """So that plain ddp will do."""

    class Watch(Callback):
        seen = 0

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
            assert (module.net.router.adversarial.weight.grad.abs().sum() > 0) == (weight > 0)
            self.seen += 1

    watch = Watch()
    fit(aw_mtard(awake(aw_net()), router_weight=weight), callbacks=[watch])
    assert watch.seen == 3


def test_each_half_trains_with_its_own_images() -> None:
    """Two runs that differ in the clean images alone: statistics of the adversarial halves are those of what is attacked."""
    given = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    class Given(AWMTARD):
        def craft(self, batch: Any, eps: Any = None) -> TwiceTaughtExample:
            example = super().craft(batch, eps)
            example.x_adv, example.teacher_logits_adv = given, self.ask("teacher", given)
            return example

    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        method = Given(aw_net(), *teachers(), PGD(eps=0.2, steps=1), optimizer=sgd)
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader(n=8, seed=seed))
        found.append({name: b for name, b in method.net.net.named_buffers() if name.startswith("layers.1.") and "run" in name})
    for name, buffer in found[0].items():
        assert torch.equal(buffer, found[1][name]) == (".adv." in name), name


def test_the_attack_meets_the_deployed_network() -> None:
    """Gradients through router, gates and mixed BatchNorms, as an evaluation sees them."""
    method, (x, y) = aw_mtard(awake(aw_net()), attack=PGD(eps=0.2, steps=3, random_start=False)), next(iter(loader()))
    fit(method)
    awake(method.net)
    example = method.craft((x, y, torch.arange(len(x))))
    assert torch.equal(example.x_adv, PGD(eps=0.2, steps=3, random_start=False)(method.net.eval(), x, y))


def test_passes() -> None:
    method, seen = aw_mtard(), []
    method._checked = {True, False}
    method.net.net.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled() and method.net.training))
    fit(method)
    # Each of 3 steps: 2 of the attack and 2 of the loss; what is looked at before the training comes in eval mode.
    assert seen.count(True) == 3 * 2
    assert method.attack.forwards == method.attack.backwards == 2 * 24


def test_an_average_of_the_whole_network() -> None:
    """EMA follows gates, router and both halves, and its copy is a network of its own."""
    method, ema = aw_mtard(), EMA(0.5)
    fit(method, callbacks=[ema])
    names = {name for name in method.state_dict() if name.startswith("net.") and "tracked" not in name}
    assert names <= ema.weights.keys()
    raw, x = deepcopy(method.net).eval(), torch.rand(4, 1, 8, 8)
    with ema.applied(method):
        averaged = deepcopy(method.net).eval()
    assert not torch.equal(averaged(x), raw(x)) and torch.equal(method.net.eval()(x), raw(x))


def test_the_router_learns_who_attacks() -> None:
    """With attacks that a small network sees at once, p of attacked images rises above that of clean ones."""
    method = aw_mtard(router_weight=10.0, attack=PGD(eps=0.5, steps=1, random_start=False))
    fit(method, epochs=30)
    x, y = next(iter(loader()))
    net = method.net.eval()
    x_adv = method.attack(net, x, y)
    assert net.share(net.signals(x_adv)).mean() > net.share(net.signals(x)).mean() + 0.5


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: aw_mtard(SmallCNN(width=4)), TypeError, "AWMTARD trains an AW-Net"),
        (lambda: aw_mtard(router_weight=-1), ValueError, "router_weight=-1"),
        (lambda: aw_mtard(attack=PGD(bn_mode="train")), ValueError, "bn_mode='train'"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
