"""PeerAiD: its loss by pencil, where its gradient flows, what its attack climbs, and what becomes of the peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl import load_model
from robust_pl.callbacks import PGD, SWA
from robust_pl.methods import PeerAiD
from robust_pl.methods.distillation.peeraid import PeerExample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, Counted, loader, sgd

WEIGHTS = {"peer_ce": 0.7, "peer_kl": 0.3, "ce": 0.2, "distillation": 1.1, "consistency": 0.9}
TEMPERATURES = {"temperature": 5.0, "peer_temperature": 2.0}


class Linear(nn.Module):
    """Three logits, linear in the four pixels of an image."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weight = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def method(**more: Any) -> PeerAiD:
    return PeerAiD(Linear(0), Linear(1), PGD(0.1, 0.03, 1, random_start=False), optimizer=sgd, num_classes=3, **more)


def example() -> PeerExample:
    generator = torch.Generator().manual_seed(2)
    x, x_adv = torch.rand(2, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    return PeerExample(x, torch.tensor([0, 2]), torch.arange(2), x_adv)


def softmax(row: list[float], t: float = 1.0) -> list[float]:
    total = sum(math.exp(v / t) for v in row)
    return [math.exp(v / t) / total for v in row]


def kl(target: list[float], prediction: list[float], t: float) -> float:
    pairs = zip(softmax(target, t), softmax(prediction, t), strict=True)
    return t * t * sum(p * math.log(p / q) for p, q in pairs)


def by_hand(batch: PeerExample, peer_terms: bool = True, student_terms: bool = True, classes: float = 3.0) -> float:
    with torch.no_grad():
        clean, adv = Linear(0)(batch.x).tolist(), Linear(0)(batch.x_adv).tolist()
        peer = Linear(1)(batch.x_adv).tolist()
    total = 0.0
    for s, a, p, y in zip(clean, adv, peer, batch.y.tolist(), strict=True):
        if peer_terms:
            total += 0.7 * -math.log(softmax(p)[y]) + 0.3 * kl(a, p, 2.0) / classes
        if student_terms:
            total += 0.2 * -math.log(softmax(a)[y]) + (1.1 * kl(p, a, 5.0) + 0.9 * kl(s, a, 5.0)) / classes
    return total / 2


@pytest.mark.parametrize(("kl_reduction", "classes"), [("mean", 3.0), ("batchmean", 1.0)])
def test_the_loss_by_hand(kl_reduction: str, classes: float) -> None:
    found = method(**WEIGHTS, **TEMPERATURES, kl_reduction=kl_reduction).loss(example())
    assert found.shape == () and found.item() == pytest.approx(by_hand(example(), classes=classes), abs=1e-10)


def slope(of: Callable[[], Tensor], parameter: nn.Parameter) -> Tensor:
    """Central differences."""
    found, h = torch.zeros_like(parameter), 1e-6
    with torch.no_grad():
        for i in range(parameter.numel()):
            place = parameter.view(-1)[i]
            before = place.item()
            place.fill_(before + h)
            high = of().item()
            place.fill_(before - h)
            found.view(-1)[i] = (high - of().item()) / (2 * h)
            place.fill_(before)
    return found


def test_gradients_flow_through_the_students_targets_and_not_through_the_peers() -> None:
    both = method(**WEIGHTS, **TEMPERATURES)
    both.loss(example()).backward()
    # The student's is that of the whole loss: none of its logits is a constant.
    assert torch.allclose(both.net.weight.grad, slope(lambda: both.loss(example()), both.net.weight), atol=1e-8)
    # The peer's is that of its own two terms alone.
    own = method(**WEIGHTS | {"distillation": 0.0}, **TEMPERATURES)
    assert torch.allclose(both.peer.weight.grad, slope(lambda: own.loss(example()), own.peer.weight), atol=1e-8)
    assert (both.peer.weight.grad - slope(lambda: both.loss(example()), both.peer.weight)).abs().max() > 1e-3


def test_the_attack_leads_away_from_the_peer() -> None:
    """One step on KL(P(x) || S(x)): its slope by the student's logits is softmax(S) - softmax(P)."""
    both, batch = method(), example()
    crafted = both.craft((batch.x, batch.y, batch.index))
    with torch.no_grad():
        peer, student = both.peer(batch.x), both.net(batch.x)
        uphill = (student.softmax(1) - peer.softmax(1)) @ both.net.weight.T
    expected = (batch.x + 0.03 * uphill.sign().view_as(batch.x)).clamp(0, 1)
    assert torch.allclose(crafted.x_adv, expected, atol=1e-12)
    assert torch.equal(crafted.peer_logits, peer) and not crafted.peer_logits.requires_grad
    assert PeerAiD(Linear(0), Linear(1)).attack.random_start == "normal"


def test_a_step_asks_the_peer_twice_and_attacks_move_no_statistics() -> None:
    peer = Counted()
    both = PeerAiD(SmallCNN(width=4), peer, PGD(steps=3, random_start="normal"), optimizer=sgd)
    both._checked = {True, False}
    x, y = next(iter(loader()))
    statistics = peer.net.layers[1].running_mean.clone()
    both.train().craft((x, y))
    assert torch.equal(peer.net.layers[1].running_mean, statistics) and peer.net.layers[1].training
    peer.forwards = peer.for_training = 0
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(both, loader())
    assert (peer.forwards, peer.for_training) == (3 * 2, 3)
    assert not torch.equal(peer.net.layers[1].running_mean, statistics)


def test_without_consistency_the_student_is_not_asked_about_clean_images() -> None:
    net = Counted()
    both = PeerAiD(net, SmallCNN(width=4), PGD(steps=3, random_start="normal"), consistency=0, optimizer=sgd)
    both._checked = {True, False}
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(both, loader())
    assert (net.forwards, net.for_training) == (3 * 4, 3)


def test_one_optimizer_does_what_the_authors_two_do() -> None:
    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4)

    together, apart = method(), method()
    one = optimizer(together.trained_parameters())
    two = optimizer(apart.net.parameters()), optimizer(apart.peer.parameters())
    for _ in range(3):
        for both, optimizers in ((together, (one,)), (apart, two)):
            both.zero_grad()
            both.loss(example()).backward()
            for each in optimizers:
                each.step()
    assert torch.equal(together.net.weight, apart.net.weight) and torch.equal(together.peer.weight, apart.peer.weight)


def test_the_peer_is_saved_and_the_student_is_what_is_evaluated_and_loaded(tmp_path: Path) -> None:
    both = PeerAiD(SmallCNN(width=4), SmallCNN(width=6), PGD(0.1, steps=2, random_start="normal"), optimizer=sgd)
    trainer = Trainer(max_epochs=2, callbacks=[SWA(0), PGD(0.1, steps=2)], **QUIET)
    trainer.fit(both, loader(), loader(seed=1))
    assert {"val/acc_worst", "val_swa/acc_worst"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"net", "peer"}
    x = torch.rand(4, 1, 8, 8)
    net = load_model(tmp_path / "x.ckpt", net=SmallCNN(width=4))
    assert torch.equal(net(x), both.eval()(x)) and torch.equal(net(x), both.net(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: method(temperature=0), "temperature=0 must be above 0"),
        (lambda: method(peer_kl=-1.0), "peer_kl=-1.0 must be at least 0"),
        (lambda: method(peer_ce=0, peer_kl=0), "peer learns nothing"),
        (lambda: method(distillation=0, consistency=0), "student learns nothing"),
        (lambda: method(kl_reduction="sum"), "kl_reduction='sum'"),
        (lambda: PeerAiD(*[SmallCNN()] * 2), "one network"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_peer_of_other_classes_is_refused() -> None:
    both = PeerAiD(SmallCNN(width=4), SmallCNN(7, width=4), optimizer=sgd)
    with pytest.raises(ValueError, match="the peer returns logits of shape"):
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(both, loader())
