"""The logic of replaying, with a stand-in for CUDA graphs: it writes where it wrote before, and spoils what it has used."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_pl.callbacks import FAB, PGD
from robust_pl.methods import PGDAT
from robust_pl.nets import graphed
from robust_pl.nets.dual_norm import dual_batch_norm
from robust_pl.nets.folding import Folded
from robust_pl.nets.graphed import Graphed, GraphedTraining

from .test_folding import lively, small

Log = list[Callable[..., Any]]


class Replay(torch.autograd.Function):
    """As torch's: results lie in the same memory in every pass, and the backward pass spoils what the forward pass kept."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, *given: Tensor) -> Tensor:
        ctx.tape, ctx.count = tape, len(given)
        return tape.forward(given)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.tape.backward(gradient)


class Tape:
    busy = False

    def __init__(self, function: Callable[..., Tensor], sample: tuple[Tensor, ...]) -> None:
        for _ in range(4):
            logits = self.alone(function, sample)
        # It goes on with the network as it is: tests of what would be stale look at whether it was recorded anew.
        self.function, self.kept = weakless(function), None
        self.logits = torch.empty_like(logits.detach())
        self.gradients = [torch.zeros_like(t) if t.requires_grad else None for t in sample]

    def alone(self, function: Callable[..., Tensor], given: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        before, Tape.busy = Tape.busy, True
        try:
            return function(*given)
        finally:
            Tape.busy = before

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(own is not None) for t, own in zip(given, self.gradients, strict=True)]
            self.kept = leaves, self.alone(self.function, leaves)
        self.logits.copy_(self.kept[1].detach())
        return self.logits.detach()

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if self.kept is None:
            for own in self.gradients:
                if own is not None:
                    own.fill_(7.0)  # spoilt
        else:
            leaves, logits = self.kept
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            with torch.enable_grad():
                found = iter(torch.autograd.grad(logits, asked, gradient, allow_unused=True))
            for own in self.gradients:
                if own is not None:
                    one = next(found)
                    own.zero_() if one is None else own.copy_(one)
        self.kept = None
        return tuple(None if own is None else own.detach() for own in self.gradients)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What was recorded."""
    log: Log = []

    def record(function: Callable[..., Tensor], sample: tuple[Tensor, ...], allow_unused_input: bool = False) -> Any:
        tape = Tape(function, sample)
        log.append(function)
        return lambda *given: Replay.apply(tape, *given)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(graphed, "_on_cuda", lambda x: not Tape.busy)
    monkeypatch.setattr(graphed, "own_cache", lambda: torch.autocast("cpu", enabled=False))
    return log


def weakless(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The network itself, not kept: a recording knows no network."""
    if not isinstance(function, Folded):
        return function
    model = weakref.ref(function.model)
    return lambda x: model()(x)  # type: ignore[misc]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def asked(net: nn.Module, x: Tensor) -> Tensor:
    return Graphed(Folded(net))(x.detach().requires_grad_())


def test_recorded_once_and_the_same(recorded: Log, x: Tensor) -> None:
    net = lively(small())
    for _ in range(3):
        z, w = (x.clone().requires_grad_() for _ in range(2))
        found, expected = Graphed(Folded(net))(z), net(w)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), z), torch.autograd.grad(expected.sum(), w))
    assert len(recorded) == 1


def test_a_pass_that_is_differentiated_for_each_class(recorded: Log, x: Tensor) -> None:
    net = lively(small())
    z, w = (x.clone().requires_grad_() for _ in range(2))
    found, expected = Graphed(Folded(net))(z), net(w)
    for label in (0, 2, 1, 0):
        a = torch.autograd.grad(found[:, label].sum(), z, retain_graph=True)
        torch.testing.assert_close(a, torch.autograd.grad(expected[:, label].sum(), w, retain_graph=True))


def test_an_attack_that_asks_for_all_classes(recorded: Log, x: Tensor) -> None:
    net = lively(small())
    y = net(x).argmax(1)
    attack, replayed = (FAB(0.1, steps=3, n_targets=None) for _ in range(2))
    replayed.cuda_graphs = True
    torch.testing.assert_close(replayed(net, x, y), attack(net, x, y), atol=1e-4, rtol=0)
    assert recorded


def test_only_the_latest_pass_can_be_differentiated(recorded: Log, x: Tensor) -> None:
    ask = Graphed(Folded(lively(small())))
    first, second = (x.clone().requires_grad_() for _ in range(2))
    logits = ask(first)
    ask(second)
    with pytest.raises(RuntimeError, match="a pass was replayed before"):
        logits.sum().backward()


def test_another_state_is_another_recording(recorded: Log, x: Tensor) -> None:
    net = lively(small())
    routing = dual_batch_norm(net)
    for weight, recordings in ((0.0, 1), (1.0, 2), (0.0, 2), (1.0, 2)):
        with routing.use(weight):
            torch.testing.assert_close(asked(net, x), net(x))
        assert len(recorded) == recordings


def test_hooks_that_see_are_served_and_those_that_count_told(recorded: Log, x: Tensor) -> None:
    net, seen = lively(small()), []
    asked(net, x)
    handle = net[4].register_forward_hook(lambda module, given, out: seen.append(out))
    asked(net, x)
    assert len(seen) == 1
    handle.remove()
    asked(net, x)
    assert len(seen) == 1 and len(recorded) == 1


class CountsPasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.passes = lively(small()), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.net(x) * (1 + self.passes % 2)


def test_what_is_another_network_in_every_pass_is_not_recorded_for_ever(recorded: Log, x: Tensor) -> None:
    net = CountsPasses()
    for _ in range(12):
        asked(net, x)
    assert len(recorded) <= 2 * graphed._WAYS


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of the identity; it takes what is no tensor for what has no gradient."""

    @staticmethod
    def forward(ctx: Any, z: Any) -> Tensor:
        return z.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.last((0.5 * z + Straight.apply(z)).flatten(1))


def test_no_gradient_is_lost_where_a_bias_comes_late(x: Tensor) -> None:
    """The recording is compared with the network, and its gradient is another."""
    net = lively(Rounds())
    expected = graphed.logits_and_gradient(net, x)
    assert not graphed.alike(graphed.logits_and_gradient(Folded(net, late_bias=True), x), expected)
    assert graphed.alike(graphed.logits_and_gradient(Folded(net), x), expected)


def test_recordings_do_not_keep_networks_alive(recorded: Log, x: Tensor) -> None:
    net = lively(small())
    asked(net, x)
    kept = weakref.ref(net)
    recorded.clear()
    del net
    gc.collect()
    assert kept() is None


def test_a_method_that_trains_and_attacks_is_recorded_once(recorded: Log, x: Tensor) -> None:
    attack = PGD(0.1, steps=2)
    attack.cuda_graphs = True
    method = PGDAT(small(), attack)
    for _ in range(4):
        attack(method, x, torch.tensor([0, 1, 2, 0]))
    assert len(recorded) == 1


def trained(net: nn.Module, x: Tensor, graphs: bool, steps: int = 3) -> list[Tensor]:
    """Gradients of two batches, summed up by autograd, in each step."""
    y, replay = torch.tensor([0, 1, 2, 0]), GraphedTraining(net, False)
    net._compiled_call_impl = replay if graphs else None
    sums = []
    for _ in range(steps):
        replay.next_step()
        net.zero_grad()
        first = None
        for images in (x, 1 - x):
            F.cross_entropy(net(images), y).backward()
            first = first or [p.grad for p in net.parameters()]
        sums += [p.grad.clone() for p in net.parameters()]
    return sums


def test_gradients_are_summed_over_batches(recorded: Log, x: Tensor) -> None:
    torch.manual_seed(0)
    net = small().train()
    twin = copy.deepcopy(net)
    for a, b in zip(trained(net, x, True), trained(twin, x, False), strict=True):
        torch.testing.assert_close(a, b)
    assert len(recorded) == 1
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_somebody_keeps_stay(recorded: Log, x: Tensor) -> None:
    torch.manual_seed(0)
    net = small().train()
    net._compiled_call_impl = GraphedTraining(net, False)
    weights = tuple(net.parameters())
    first = torch.autograd.grad(net(x).square().sum(), weights)
    copies = [gradient.clone() for gradient in first]
    torch.autograd.grad(net(1 - x).square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_a_training_pass_is_differentiated_once(recorded: Log, x: Tensor) -> None:
    net = small().train()
    net._compiled_call_impl = GraphedTraining(net, False)
    logits = net(x)
    logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a training pass was replayed before"):
        logits.sum().backward()


def test_training_is_not_replayed_where_it_is_something_else(recorded: Log, x: Tensor) -> None:
    class Asked(nn.Sequential):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            return super().forward(x) * (1 + twice)

    net = Asked(*small(), nn.Dropout(0.0)).train()
    replay = net._compiled_call_impl = GraphedTraining(net, False)
    once = net(x)
    torch.testing.assert_close(net(x, twice=True), 2 * once)
    assert len(recorded) == 1 and len(replay._slots) == 1
    runs = replay._slots[0].runs
    for change, back in ((lambda: net[1].eval(), lambda: net[1].train()), (lambda: setattr(net[-1], "p", 0.5), lambda: None)):
        change()
        replay.next_step()
        net(x)
        back()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    replay.next_step()
    net(x)
    assert replay._slots[0].runs == runs


def test_recording_leaves_random_streams_alone(recorded: Log, x: Tensor) -> None:
    net = nn.Sequential(nn.Dropout(0.5), *small()).train()
    net._compiled_call_impl = GraphedTraining(net, False)
    torch.manual_seed(0)
    net._compiled_call_impl._record(x)
    found = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3))
