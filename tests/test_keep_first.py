"""keep="first": the verdicts of keep="best" for fewer passes, and nothing that a device would have to wait for in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_pl.callbacks import BIM, MIM, PGD
from robust_pl.callbacks.attacks.first import First
from robust_pl.callbacks.attacks.iterative import Iterative, Memory
from robust_pl.callbacks.attacks.problem import Problem
from robust_pl.nets import SmallCNN

from .test_attacks import Bumpy, Counting, linear
from .test_iterative_attacks import KEEPING

EVERY = torch.arange(60)
Task = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture
def bumps() -> Task:
    x = torch.rand(60, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    return Bumpy(), x, torch.zeros(60, dtype=torch.int64)


@pytest.fixture(scope="module")
def small() -> Task:
    """A network with BatchNorm, and images that it gets right but for every fifth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SmallCNN(width=4).eval()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.linear.bias -= net(x).mean(0)  # so that no class is sure
    y = net(x).argmax(1)
    return net, x, torch.where(EVERY % 5 == 0, (y + 1) % 10, y)


class Iterates:
    """All images that a walk with one gradient at each iterate looked at, and where each sample should have stopped."""

    def __init__(self, make: Callable[..., Iterative], task: Task, steps: int) -> None:
        net, x, y = task
        seen: list[Tensor] = []
        hooked = nn.Sequential(net)
        hooked.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        make(steps=steps, keep="best").run(hooked, x, y, index=EVERY)
        self.seen = torch.stack(seen)
        wrong = torch.stack([net(point).argmax(1) != y for point in seen])
        self.broken = wrong.any(0)
        self.stop = torch.where(self.broken, wrong.int().argmax(0), steps)
        self.x_adv = self.seen[self.stop, EVERY]
        self.passes = (self.stop + 1).clamp(max=steps)  # nobody looks at the last iterate


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KEEPING])
def test_the_same_samples_stand_as_with_the_best_kept(make: Callable[..., Any], bumps: Task) -> None:
    model, x, y = bumps
    first, best = (make(steps=8, keep=keep).run(model, x, y, index=EVERY) for keep in ("first", "best"))
    stands = [model(found.x_adv).argmax(1) == y for found in (first, best)]
    assert torch.equal(*stands) and 0 < stands[0].sum() < 60
    assert torch.equal(first.x_adv[~stands[0]], best.x_adv[~stands[0]])
    assert first.forwards < best.forwards and first.backwards < best.backwards


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "more", [{}, {"targeted": True}, {"objective": "margin", "restarts": 3}], ids=["ce", "target", "again"]
)
def test_on_a_network_in_every_norm(norm: str, more: dict[str, Any], small: Task) -> None:
    net, x, y = small
    eps = {"linf": 0.04, "l2": 0.15, "l1": 1.0}[norm] * torch.linspace(0.1, 1, 60).view(-1, 1, 1, 1)
    if more.get("targeted"):
        y = net(x).topk(2).indices[:, 1]  # the likeliest other class
    first, best = (
        PGD(0.1, steps=5, norm=norm, keep=keep, **more).run(net, x, y, eps=eps, index=EVERY) for keep in ("first", "best")
    )
    stands = [net(found.x_adv).argmax(1) == y for found in (first, best)]
    assert torch.equal(*stands) and 0 < stands[0].sum() < 60
    assert first.forwards < best.forwards


@pytest.mark.parametrize(
    "make", [partial(PGD, 0.15, 0.02), partial(MIM, 0.15, 0.02), partial(PGD, 0.2, 0.05, norm="l2")], ids=["pgd", "mim", "l2"]
)
def test_each_sample_stops_at_its_first_and_pays_until_there(make: Callable[..., Iterative], bumps: Task) -> None:
    net, x, y = bumps
    expected = Iterates(make, bumps, 6)
    assert {0, 1, 6} <= set(expected.stop.tolist())
    counting = Counting(net)
    found = make(steps=6, keep="first").run(counting, x, y, index=EVERY)
    assert torch.equal(found.x_adv, expected.x_adv)
    for passes, seen in ((found.forward_passes, counting.forwards), (found.backward_passes, counting.backwards)):
        assert torch.equal(passes.of_each, expected.passes)
        assert passes.total == seen


def test_an_undefended_network_costs_next_to_nothing() -> None:
    x = 0.4 + 0.2 * torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    net, y = linear(torch.tensor([[1.0] * 4, [-1.0] * 4]), torch.tensor([-2.0, 2.0])), torch.zeros(10, dtype=torch.int64)
    y[net(x).argmax(1) == 1] = 1
    y[0] = 1 - y[0]  # wrong as it is
    found = BIM(0.5, steps=100, step_size=0.1, keep="first").run(net, x, y)
    spent = found.forward_passes.of_each
    assert spent[0] == 1 and (spent[1:] <= 3).all()
    assert (net(found.x_adv).argmax(1) != y).all()


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KEEPING if name != "eot"])
def test_batches_do_not_matter(make: Callable[..., Any], bumps: Task) -> None:
    net, x, y = bumps
    attack = make(steps=5, keep="first")
    whole = attack.run(net, x, y, index=EVERY)
    parts = [attack.run(net, x[rows], y[rows], index=rows) for rows in EVERY.flip(0).split(7)]
    assert torch.equal(torch.cat([part.x_adv for part in parts]).flip(0), whole.x_adv)
    assert torch.equal(torch.cat([part.forward_passes.of_each for part in parts]).flip(0), whole.forward_passes.of_each)


class NoReading(TorchDispatchMode):
    """Refuses what would make a device wait."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = str(function)
        assert not any(waits in name for waits in ("_local_scalar_dense", "nonzero", "aten.equal")), name
        return function(*arguments, **(named or {}))


def test_in_training_nothing_waits_and_all_is_as_on_the_cpu(small: Task) -> None:
    """Which computes the same with a shrinking batch."""
    net, x, y = small
    attack = PGD(0.05, steps=4, keep="first")
    attack.run(net, x, y, careful=False)  # what is looked at once
    attack.calls = 0
    with NoReading():
        waits_not = attack.run(net, x, y, careful=False)
    assert (waits_not.forward_passes.of_each == 4).all()
    attack.calls = 0
    looks = attack.run(net, x, y)
    torch.testing.assert_close(looks.x_adv, waits_not.x_adv)
    assert looks.forwards < 4 * 60
    attack.raise_if_violated()


def test_nobody_leaves_a_batch_whose_samples_depend_on_each_other(small: Task) -> None:
    net, x, y = small
    found = PGD(0.05, steps=3, keep="first", bn_mode="train_no_track").run(net, x, y)
    assert (found.forward_passes.of_each == 3).all()


def test_where_to_look_is_to_wait_a_batch_is_cut_seldom(bumps: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    make, begin = partial(PGD, 0.15, 0.02), First.__init__

    def waits(walk: First, *arguments: Any) -> None:
        begin(walk, *arguments)
        walk._every, walk._worth = 4, 0.25

    expected = Iterates(make, bumps, 12)
    monkeypatch.setattr(First, "__init__", waits)
    found = make(steps=12, keep="first").run(*bumps, index=EVERY)
    assert torch.equal(found.x_adv, expected.x_adv)
    left, paid = torch.ones(60, dtype=torch.bool), torch.zeros(60, dtype=torch.int64)
    for looked in (4, 8, 12):
        paid += 4 * left
        stays = left & (expected.stop >= looked)
        if left.sum() - stays.sum() >= 0.25 * left.sum():
            left = stays
    assert torch.equal(found.forward_passes.of_each, paid)
    assert len(paid.unique()) > 1


class Forgetful(PGD):
    """Remembers a number of the whole batch."""

    def direction(self, problem: Problem, x_adv: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        memory["mean"] = x_adv.mean()
        return super().direction(problem, x_adv, memory)


def test_what_a_walk_remembers_of_the_whole_batch_is_refused(bumps: Task) -> None:
    with pytest.raises(ValueError, match=r"memory\['mean'\] of the walk has shape \(\) for 60 samples: .* choose keep='best'"):
        Forgetful(0.15, 0.02, steps=3, keep="first").run(*bumps)


@pytest.mark.slow
def test_from_the_command_line(robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("test", "-c", tiny, "--attacks.pgd.init_args.keep", "first", "--trainer.limit_test_batches", 1)
    assert "pgd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        robust_pl("test", "-c", tiny, "--attacks.pgd.init_args.keep", "worst")
