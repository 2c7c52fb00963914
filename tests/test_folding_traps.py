"""Networks that would give something else when folded, if nobody took care; and what folding leaves behind: nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from robust_pl.callbacks import PGD
from robust_pl.nets.folded_layers import aside
from robust_pl.nets.folding import Folded, look_at

from .test_folding import agree, folds, lively, small


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, its BatchNorm, and a way from one to the other that a test chooses."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor], sure: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.way, self.kept, self.list, self.sure, self.passes = way, None, [], sure, 0
        self.register_buffer("seen", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.last(self.way(self, x).relu().mean((2, 3)))


def straight(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def both(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) + 0.5 * z


def data_of(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) + z.data


def view(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    flat = z.flatten(2)
    return net.norm(z) * flat.mean(2)[..., None, None]


def in_place(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    z.mul_(2)
    return net.norm(z)


def attribute(net: Net, x: Tensor) -> Tensor:
    net.kept = net.conv(x)
    y = net.norm(net.kept)
    return y + net.kept.mean()


def in_a_list(net: Net, x: Tensor) -> Tensor:
    net.list.append(net.conv(x))
    return net.norm(net.list[-1])


def numpy(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) * float(z.detach().numpy().max())


def size(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) * z.shape[1]


def forward_called(net: Net, x: Tensor) -> Tensor:
    raw = net.conv.forward(x)
    return net.norm(net.conv(x)) + raw


def named(net: Net, x: Tensor) -> Tensor:
    return net.norm(input=net.conv(input=x))


def reads_weight(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.conv.weight.sum()


def two_norms(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) + F.batch_norm(z, net.norm.running_mean, net.norm.running_var)


def depends(net: Net, x: Tensor) -> Tensor:
    """Reads the convolution for some images."""
    z = net.conv(x)
    y = net.norm(z)
    return y + z if len(x) > 2 else y


def depends_and_catches(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    y = net.norm(z)
    try:
        return y + z.abs() if len(x) > 2 else y
    except Exception:
        return y


def depends_and_keeps(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    if len(x) > 2:
        net.kept = z
    return net.norm(z)


def depends_and_asks_twice(net: Net, x: Tensor) -> Tensor:
    raw = net.conv(x) if len(x) > 2 else 0
    return net.norm(net.conv(x)) + raw


def weights_from_the_image(net: Net, x: Tensor) -> Tensor:
    own = {"weight": net.conv.weight * x.mean(), "bias": net.conv.bias}
    return net.norm(functional_call(net.conv, own, (x,)))


def weights_of_the_moment(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.conv.weight.copy_(net.other.weight * len(x))
    return net.norm(net.conv(x))


def augments(net: Net, x: Tensor) -> Tensor:
    return straight(net, x) + straight(net, x.flip(3))


def asks_in_its_pass(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (inner,) = torch.autograd.grad(straight(net, z).square().sum(), z)
    return straight(net, x + 0.1 * inner.sign())


def each_alone(net: Net, x: Tensor) -> Tensor:
    return vmap(lambda one: net.norm(net.conv(one[None]))[0])(x)


def strides(net: Net, x: Tensor) -> Tensor:
    """Takes for granted how images lie in memory."""
    return net.norm(net.conv(x.as_strided(x.shape, (192, 64, 8, 1))))


def copies_itself(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    net.passes += 1
    twin = copy.deepcopy(net.norm)
    return net.norm(z) + twin(net.other(x))


def noisy(net: Net, x: Tensor) -> Tensor:
    return straight(net, x + 0.1 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1)))


TRAPS = [straight, both, data_of, view, in_place, attribute, in_a_list, numpy, size, forward_called, named, reads_weight]
TRAPS += [two_norms, depends, depends_and_catches, depends_and_keeps, depends_and_asks_twice, weights_from_the_image]
TRAPS += [weights_of_the_moment, augments, asks_in_its_pass, each_alone, strides, copies_itself, noisy]
FOLDED = [straight, named, reads_weight, noisy]


@pytest.mark.parametrize("known", [2, 4], ids=["seen-on-two", "seen-on-all"])
@pytest.mark.parametrize("way", TRAPS, ids=lambda way: way.__name__)
def test_the_same_logits_and_gradients(way: Callable[..., Tensor], known: int, x: Tensor) -> None:
    net = lively(Net(way))
    faster = Folded(net)
    faster(x[:known])
    for images in (x, x[:1], x):
        agree(net, images, faster)
        agree(net, images)
    assert all("forward" not in vars(module) for module in net.modules())
    if way in (attribute, depends_and_keeps):
        assert type(net.kept) is Tensor
        torch.testing.assert_close(net.kept.detach(), net.conv(x))


@pytest.mark.parametrize("way", FOLDED, ids=lambda way: way.__name__)
def test_what_can_be_folded_is(way: Callable[..., Tensor], x: Tensor) -> None:
    assert folds(lively(Net(way)), x) == 1


def test_the_look_leaves_nothing_behind(x: Tensor) -> None:
    def counts(net: Net, x: Tensor) -> Tensor:
        net.seen.add_(1)
        net.list.append(1)
        return straight(net, x) + random.random() + torch.rand((), generator=net.generator)

    net, twin = (lively(Net(counts)) for _ in range(2))
    net.train()
    net.bound = net.conv  # not by a name of its own in a copy, but the same layer
    object.__setattr__(net, "way", lambda copied, x: counts(net, x))  # goes through the network itself, in train mode
    before = copy.deepcopy(net.state_dict())
    state = random.getstate()
    look_at(net, x)
    assert random.getstate() == state and torch.equal(net.generator.get_state(), twin.generator.get_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_a_forward_that_somebody_bound_is_that_of_the_copy(x: Tensor) -> None:
    net, asked = lively(Net(straight)), []
    net.conv.register_forward_hook(lambda *_: asked.append(1))
    own = type(net).forward
    net.forward = MethodType(lambda self, x: 2 * own(self, x), net)
    look_at(net, x)
    assert not asked
    agree(net, x)


@pytest.mark.parametrize("later", [False, True])
def test_hooks_on_the_way_see_what_the_network_computes(later: bool, x: Tensor) -> None:
    net, seen = lively(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))), []
    if later:
        Folded(net)(x)
    handle = net[0].register_forward_hook(lambda module, given, out: seen.append(out))
    agree(net, x)
    assert all(type(out) is Tensor for out in seen)
    torch.testing.assert_close(seen[0].detach(), net[0][0](x))
    handle.remove()
    Folded(net)(x)


def test_hooks_on_all_modules_see_what_the_network_computes(x: Tensor) -> None:
    net, seen = lively(Net(straight)), []
    Folded(net)(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(out))
    try:
        Folded(net)(x)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0].detach(), net.conv(x).detach())


@pytest.mark.parametrize("what", ["weight", "mean", "layer", "norm", "shared"])
def test_what_changes_later_counts(what: str, x: Tensor) -> None:
    net = lively(Net(straight))
    faster = Folded(net)
    agree(net, x, faster)
    with torch.no_grad():
        if what == "weight":
            net.conv.weight.mul_(2)
        elif what == "mean":
            net.norm.running_mean = torch.ones(4)
        elif what == "layer":
            net.conv = nn.Conv2d(3, 4, 3)
        elif what == "norm":
            net.norm = nn.GroupNorm(2, 4)
        else:
            net.way = augments
    agree(net, x, faster)
    agree(net, x)


def test_a_copy_made_during_a_pass_is_a_network_of_its_own(x: Tensor) -> None:
    copies: list[Any] = []

    def copied(net: Net, x: Tensor) -> Tensor:
        z = net.norm(net.conv(x))
        copies.append((copy.deepcopy(net.conv), pickle.loads(pickle.dumps(net.norm))))
        return z

    net = lively(Net(copied))
    Folded(net)(x)
    conv, norm = copies[-1]
    net.way = straight
    expected = net.norm(net.conv(x))
    torch.testing.assert_close(norm(conv(x)), expected)


def test_other_threads_ask_the_network_itself(x: Tensor) -> None:
    found: list[Tensor] = []

    def apart(net: Net, x: Tensor) -> Tensor:
        z = net.conv(x)
        if len(x) > 2:  # and so not while it is looked at
            thread = threading.Thread(target=lambda: found.append(net.norm(net.conv(x))))
            thread.start()
            thread.join()
        return net.norm(z)

    net = lively(Net(apart))
    faster = Folded(net)
    faster(x)
    assert look_at(net, x).pairs and len(found[-1]) == len(x)
    torch.testing.assert_close(found[-1], straight(net, x))


def test_who_runs_the_network_again_to_measure_it_runs_it_as_it_is(x: Tensor) -> None:
    measured: list[Tensor] = []
    net = lively(Net(straight))

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not measured:
            measured.append(x)
            with aside():
                measured.append(net.conv(x))

    measure.counts_only = True  # type: ignore[attr-defined]
    net.register_forward_pre_hook(measure)
    assert folds(net, x) == 1
    torch.testing.assert_close(measured[1], net.conv(x))


def test_a_network_that_raises_is_as_it_was(x: Tensor) -> None:
    def breaks(net: Net, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise OSError("no")
        return straight(net, x)

    net = lively(Net(breaks)).float()
    net.train()
    state = copy.deepcopy(net.state_dict())
    look_at(net, x[:2].float())
    with pytest.raises(OSError, match="no"):
        PGD(0.1, steps=1)(net, x.float(), torch.zeros(4, dtype=torch.int64))
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_networks_die(x: Tensor) -> None:
    net = small()
    net[0].owner = [net]  # a layer that knows its network
    kept = weakref.ref(net)
    assert folds(net, x[:, :1]) == 1
    del net
    gc.collect()
    assert kept() is None


def test_folded_weights_go_without_the_garbage_collector(x: Tensor) -> None:
    gc.disable()
    try:
        faster = Folded(lively(Net(straight)))
        faster(x)
        faster(x)
        layers = weakref.ref(faster.layers)
        del faster
        assert layers() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("wrap", [torch.jit.script, torch.fx.symbolic_trace, nn.DataParallel], ids=["script", "fx", "parallel"])
def test_other_kinds_of_networks(wrap: Callable[..., nn.Module], x: Tensor) -> None:
    agree(wrap(small()).eval(), x[:, :1])
    agree(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), wrap(small())).eval(), x[:, :1])


def test_a_lazy_network(x: Tensor) -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).eval()
    Folded(net)(x)
    agree(net, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_of_a_network_in_half_precision(dtype: torch.dtype, x: Tensor) -> None:
    net = lively(Net(straight)).to(dtype)
    found, expected = Folded(net)(x.to(dtype)), net(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert folds(net, x.to(dtype)) == 1


def test_no_images(x: Tensor) -> None:
    net = lively(Net(straight))
    assert Folded(net)(x[:0]).shape == (0, 3)
    assert folds(net, x) == 1


def test_in_inference_mode(x: Tensor) -> None:
    net = lively(Net(straight))
    with torch.inference_mode():
        image = x + 0
        assert folds(net, image) == 1
        torch.testing.assert_close(Folded(net)(image), net(image))
    agree(net, x)
    assert folds(net, x) == 1


def test_networks_in_one_module_are_seen_each_by_itself(x: Tensor) -> None:
    both = nn.ModuleDict({"a": lively(Net(straight)), "b": lively(Net(straight), 1)})
    both["b"].conv = both["a"].conv  # shared by networks that do not run together
    for name in ("a", "b", "a"):
        agree(both[name], x)
        assert folds(both[name], x) == 1
    together = nn.Module()
    together.nets, together.forward = both, lambda x: both["a"](x) + both["b"](x)  # type: ignore[method-assign]
    agree(together, x)


class CutUp(nn.Module):
    """Puts images together again in a way in which torch's BatchNorm gets the gradient of one with channels last wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm((x * 1).flatten(2).reshape(x.shape))
        return self.last(self.conv(z.contiguous()).flatten(1))


def test_a_single_image_is_looked_at_by_itself(x: Tensor) -> None:
    net = lively(CutUp())
    for images in (x, x[:1], x):
        agree(net, images)
    assert look_at(net, x).channels_last and not look_at(net, x[:1]).channels_last
