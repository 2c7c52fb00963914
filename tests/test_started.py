"""A loss that uses the pass at which its attack took the gradient: the same step as with a pass of its own, and no trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import AWP, BIM, FGSM, PGD, RWP, SAM, NoisyFGSM, Square
from robust_pl.callbacks.weights.perturbation import Displaced
from robust_pl.methods import FGSMPGI, FGSMRSCS
from robust_pl.methods.fast.prior import PriorExample
from robust_pl.methods.fast.started import KeptPass, check_given_start, logits_at_start, run_from
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, Counted, sgd

EPS = 0.1


def plain(seed: int = 0) -> nn.Module:
    """Without BatchNorm, whose statistics another pass would move once more."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))


def indexed(n: int = 32, size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y, torch.arange(n)), size)


def pgi(net: nn.Module, kind: type[FGSMPGI] = FGSMPGI) -> FGSMPGI:
    return kind(net, FGSM(EPS, bn_mode="train"), optimizer=sgd)


class Anew(FGSMPGI):
    """Takes the pass at the start again, always."""

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> PriorExample:
        example = super().craft(batch, eps)
        example.kept = None
        return example


def opened(method: FGSMPGI, n: int = 8, shape: tuple[int, ...] = (1, 8, 8)) -> FGSMPGI:
    """As at the beginning of a run over so many samples."""
    method.per_sample.reserve(n, shape, torch.device("cpu"))
    return method


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "perturbation", [None, lambda: AWP(0.02), lambda: SAM(0.1), lambda: RWP(0.05), lambda: RWP(0.05, mix=0.5)]
)
def test_the_kept_pass_makes_the_step_of_another_pass(perturbation: Callable[[], Any] | None, accumulate: int) -> None:
    found = []
    for kind in (FGSMPGI, Anew):
        method = pgi(plain(), kind)
        callbacks = [] if perturbation is None else [perturbation()]
        settings = {**QUIET, "max_epochs": 2, "limit_val_batches": 0, "precision": "64-true"}
        Trainer(callbacks=callbacks, accumulate_grad_batches=accumulate, **settings).fit(method, indexed())
        found.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    start = torch.cat([p.detach().flatten() for p in plain().double().parameters()])
    assert torch.allclose(found[0], found[1], atol=1e-12, rtol=0) and (found[0] - start).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "passes"), [(FGSMPGI, 2), (Anew, 3)])
def test_the_kept_pass_saves_one(kind: type[FGSMPGI], passes: int) -> None:
    net = Counted()
    method = pgi(net, kind)
    method._checked = {True}
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, indexed())
    assert net.forwards == 4 * passes


def test_a_perturbation_of_weights_costs_what_another_pass_costs() -> None:
    """Attack, loss with its pass, and once more with a pass of its own at the perturbed weights."""
    net = Counted()
    method = pgi(net)
    method._checked = {True}
    Trainer(max_epochs=1, limit_val_batches=0, callbacks=[SAM(0.1)], **QUIET).fit(method, indexed())
    assert net.forwards == 4 * (1 + 1 + 2)


def test_a_pass_is_kept_for_one_use_at_its_weights() -> None:
    net = plain()
    x = torch.rand(2, 1, 8, 8)
    kept = KeptPass(net, net(x))
    assert kept.take(net) is not None and kept.take(net) is None
    kept = KeptPass(net, net(x))
    moved = Displaced([net[1].weight], [torch.ones_like(net[1].weight)])
    assert kept.take(net) is None
    kept = KeptPass(net, net(x))
    moved.restore()
    assert kept.take(net) is None
    kept = KeptPass(net, net(x))
    torch.optim.SGD(net.parameters(), 0.1).step()  # without gradients nothing moves
    assert kept.take(net) is not None


def test_gradients_reach_the_weights_through_the_attacks_own_pass() -> None:
    torch.manual_seed(0)
    method = opened(pgi(plain().double()))
    x, y, index = next(iter(indexed()))
    example = method.craft((x.double(), y, index))
    (found,) = torch.autograd.grad(logits_at_start(method, example).square().sum(), method.net[1].weight)
    (expected,) = torch.autograd.grad(method(example.start).square().sum(), method.net[1].weight)
    assert torch.allclose(found, expected, atol=1e-14) and found.abs().max() > 1e-3


def test_crafting_leaves_no_trace_and_the_graph_goes_with_its_use() -> None:
    method = opened(pgi(SmallCNN(width=4)))
    batch = next(iter(indexed()))
    x, example = batch[0], method.craft(batch)
    assert all(p.grad is None and p.requires_grad for p in method.parameters())
    assert not x.requires_grad and x.grad is None and not any(t.requires_grad for t in (example.x_adv, example.start))
    graph = weakref.ref(example.kept._logits)
    loss = method.loss(example)
    loss.backward()
    del loss
    # The example stays in the window of the step.
    assert graph() is None and example.start.grad is None and example.x_adv.grad is None and x.grad is None


def test_the_window_is_empty_after_each_step() -> None:
    method = pgi(plain())
    lengths = []
    method.log = lambda *_, **__: lengths.append(len(method._window))  # type: ignore[method-assign]
    Trainer(max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2, **QUIET).fit(method, indexed())
    assert lengths == [1, 2, 1, 2] and not method._window


@pytest.mark.parametrize("mode", ["eval", "train_no_track"])
def test_in_another_mode_than_that_of_the_loss_nothing_is_kept(mode: Any) -> None:
    method = opened(FGSMPGI(SmallCNN(width=4), FGSM(EPS, bn_mode=mode)))
    example = method.craft(next(iter(indexed())))
    assert example.kept is None and logits_at_start(method, example).requires_grad


def test_a_given_start_may_lie_outside_of_the_box_and_the_result_does_not() -> None:
    net = plain()
    x, y, _ = next(iter(indexed()))
    start = x + EPS * torch.randn_like(x).sign()
    assert start.min() < 0 and start.max() > 1
    attacked = FGSM(EPS).run(net, x, y, start=start)
    assert torch.equal(attacked.start, start.clamp(0, 1)) and not attacked.first_logits.requires_grad
    assert (attacked.x_adv - x).abs().max() <= EPS + 1e-6 and attacked.x_adv.min() >= 0 and attacked.x_adv.max() <= 1
    assert torch.equal(attacked.first_logits, net(start.clamp(0, 1)))
    kept = FGSM(EPS).run(net, x, y, start=start, keep_graph=True)
    assert kept.first_logits.requires_grad and torch.equal(kept.x_adv, attacked.x_adv)
    # The step goes on from where the start was before it was cut.
    inside = x.add(EPS * attacked.first_gradient.sign() + start - x)
    expected = torch.minimum(torch.maximum(inside, x - EPS), x + EPS).clamp(0, 1)
    assert torch.equal(attacked.x_adv, expected)


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (PGD(steps=2), TypeError, "attack is a PGD: Mine takes FGSM, whose one step begins at x"),
        (NoisyFGSM(), TypeError, "attack is a NoisyFGSM"),
        (FGSM(1.0, norm="l2"), ValueError, "attack.norm is 'l2'"),
        (FGSM(random_start=True), ValueError, "attack.random_start=True with restarts=1"),
        (FGSM(random_start=True, restarts=2), ValueError, "restarts=2"),
    ],
)
def test_attacks_that_begin_elsewhere(attack: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_given_start(attack, "Mine", "x")


def test_an_attack_without_a_gradient_at_its_start() -> None:
    method = FGSMRSCS(SmallCNN(width=4), Square(EPS, n_queries=2))
    with pytest.raises(ValueError, match=r"FGSMRSCS looks at the point .* and Square takes none"):
        run_from(method, method.clean(next(iter(indexed()))))


def test_a_compiled_network_is_refused() -> None:
    net = SmallCNN(width=4)
    net.compile()
    with pytest.raises(ValueError, match="is compiled"):
        opened(pgi(net)).craft(next(iter(indexed())))


def test_an_attack_that_chooses_its_own_start_refuses_one() -> None:
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="BIM chooses its own start"):
        BIM(0.1, steps=2).run(SmallCNN(width=2), x, torch.tensor([0, 1]), start=x)
