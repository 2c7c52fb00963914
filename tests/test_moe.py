"""Mixtures of experts: values and gradients of the naive masked form, losses by pencil, and AdvMoE's steps in turns."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from robust_pl.callbacks import EMA, FGSM, PGD, Attack
from robust_pl.callbacks.attacks.problem import Problem
from robust_pl.functional.losses import kl_divergence
from robust_pl.functional.moe import (
    class_balance,
    entropy_balance,
    expert_targets,
    routed_divergence,
    router_loss,
    switch_balance,
)
from robust_pl.methods import AdvMoE, Cosine, Example, MultiStep
from robust_pl.nets import MoEResNet18, MoESmallCNN, MoEWideResNet, SmallCNN
from robust_pl.nets.experts import MoEConv, MoENet, Route

from .test_methods import QUIET, loader, sgd

# The networks ----------------------------------------------------------------------------------------------------------


class OneHot(torch.autograd.Function):
    """One-hot of the largest score; backward it is the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class MaskedRoute:
    """All gates, and the batch as it is."""

    def __init__(self, scores: Tensor) -> None:
        self.gates = OneHot.apply(scores)


class MaskedConv(nn.Module):
    """The published form: outputs of all experts, times the gates of their channels, of which those let through are kept."""

    def __init__(self, conv: MoEConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, z: Tensor, route: MaskedRoute) -> Tensor:
        out = torch.cat([expert(z) for expert in self.conv], 1)
        mask = route.gates.repeat_interleave(out.shape[1] // len(self.conv), 1)
        kept = (out * mask[:, :, None, None]).flatten(0, 1)[mask.flatten() > 0]
        return kept.view(len(z), -1, *out.shape[2:])


def masked(net: MoENet) -> MoENet:
    """A copy that computes everything and throws most of it away."""
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoEConv):
                setattr(parent, name, MaskedConv(child))
    return net


NETS: dict[str, Callable[[], MoENet]] = {
    "MoEResNet18": lambda: MoEResNet18(experts=3, ratio=0.1, in_channels=1),
    "MoEWideResNet": lambda: MoEWideResNet(depth=10, widen_factor=1, experts=3, ratio=0.5, in_channels=1),
    "MoESmallCNN": lambda: MoESmallCNN(experts=3, width=8, router_width=4),
}


def scores_for(n: int) -> Tensor:
    """Each of three experts has images, and not in order."""
    scores = torch.randn(n, 3, dtype=torch.float64)
    scores[torch.arange(n), torch.tensor([2, 0, 1, 0, 2, 2, 1])[:n]] += 5
    return scores


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients_are_those_of_the_masked_form(name: str, train: bool) -> None:
    torch.manual_seed(0)
    ours = NETS[name]().double().train(train)
    naive = masked(ours)
    x, scores = torch.rand(7, 1, 8, 8, dtype=torch.float64), scores_for(7)
    weights = torch.randn(7, 10, dtype=torch.float64)
    found = []
    for net in (ours, naive):
        pixels, signals = x.clone().requires_grad_(), scores.clone().requires_grad_()
        logits = ours.routed(pixels, signals) if net is ours else net.head(net.path(pixels, MaskedRoute(signals)))
        trained = [p for n, p in net.named_parameters() if not n.startswith("router.")]
        found.append([logits, *torch.autograd.grad((logits * weights).sum(), [pixels, signals, *trained])])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-8)
    chosen = F.one_hot(scores.argmax(1), 3).bool()
    by_score = found[0][2]
    assert (by_score[chosen].abs() > 1e-6).all() and (by_score[~chosen] == 0).all()


class Pointwise(MoENet):
    """One layer of experts that double and treble a pixel; the head takes the logits (v, 0) of what comes out, v."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), 2, 1.0, 1, None, None)
        self.conv = MoEConv(1, 1, 2)
        self.linear = nn.Linear(1, 2, bias=False)
        self.double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0], [0.0]]))
            for factor, conv in zip((2.0, 3.0), self.conv, strict=True):
                conv.weight.zero_()[0, 0, 1, 1] = factor

    def path(self, z: Tensor, route: Route) -> Tensor:
        return self.conv(z, route).flatten(1)


def test_gates_by_pencil() -> None:
    net = Pointwise()
    x = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64).view(3, 1, 1, 1).requires_grad_()
    scores = torch.tensor([[0.1, 0.9], [0.7, 0.2], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    logits = net.routed(x, scores)
    assert logits[:, 0].tolist() == [1.5, 0.5, 3.0]
    (logits[:, 0] * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    # gradient of v times v, at the chosen expert
    assert scores.grad.tolist() == [[0, 1.5], [5, 0], [0, 300]]
    assert x.grad.flatten().tolist() == [3, 20, 300]
    # 0.25 * 10, and 0.5 * 1 + 1 * 100
    assert [conv.weight.grad[0, 0, 1, 1].item() for conv in net.conv] == [2.5, 100.5]


def test_without_a_gradient_of_the_scores_there_is_no_gate_to_multiply() -> None:
    scores = scores_for(5)
    assert Route(scores).gate is None
    with torch.no_grad():
        assert Route(scores.requires_grad_()).gate is None
    assert torch.equal(Route(scores * 1e30).gate.flatten(), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", NETS)
def test_an_image_does_not_feel_its_neighbours_or_their_order(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().double().eval()
    x, scores = torch.rand(7, 1, 8, 8, dtype=torch.float64), scores_for(7)
    with torch.no_grad():
        together = net.routed(x, scores)
        alone = torch.cat([net.routed(x[i : i + 1], scores[i : i + 1]) for i in range(7)])
        order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
        assert torch.allclose(together, alone, atol=1e-10)
        assert torch.allclose(net.routed(x[order], scores[order]), together[order], atol=1e-10)
        assert torch.equal(net(x), net.routed(x, net.signals(x)))
        assert torch.equal(net(x), net.head(net.forward_features(x)))


def test_an_expert_without_images_has_gradients_of_zero() -> None:
    net = MoESmallCNN(width=8)
    scores = torch.tensor([[2.0, 1.0]]).repeat(4, 1).requires_grad_()
    for precision in (torch.float32, torch.bfloat16):
        net.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            net.routed(torch.rand(4, 1, 8, 8), scores).sum().backward()
        for conv in net.convs:
            assert conv[0].weight.grad.abs().sum() > 0 and not conv[1].weight.grad.any()


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def test_an_image_costs_one_path_whatever_the_number_of_experts() -> None:
    x = torch.rand(8, 1, 8, 8)
    two, four = MoESmallCNN(experts=2).eval(), MoESmallCNN(experts=4).eval()
    even = [F.one_hot(torch.arange(8) % n, n).float() for n in (2, 4)]
    path = flops(lambda: two.routed(x, even[0]))
    # stem, three convolutions of one expert, head; two operations for each weight, output pixel and image
    by_hand = 2 * 8 * (9 * 32 * 64 + 9 * (32 * 16 * 64 + 16 * 32 * 16 + 32 * 32 * 16) + 32 * 10)
    assert path == by_hand == flops(lambda: four.routed(x, even[1]))
    all_of_them = masked(four)
    assert flops(lambda: all_of_them.head(all_of_them.path(x, MaskedRoute(even[1])))) > 2.9 * path


def test_the_router_sees_normalised_images() -> None:
    net = MoESmallCNN(mean=(0.5,), std=(0.25,)).eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(net.signals(x), net.router((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoESmallCNN(experts=1), "experts=1 leaves a router nothing to choose"),
        (lambda: MoEResNet18(ratio=0.0), "ratio=0.0"),
        (lambda: MoEResNet18(ratio=1.5), "ratio=1.5"),
        (lambda: MoEWideResNet(depth=29), "depth"),
        (lambda: MoESmallCNN().routed(torch.rand(2, 1, 8, 8), torch.rand(2, 3)), r"signals of shape \(2, 3\) .* 2 experts"),
        (lambda: MoESmallCNN()(torch.rand(2, 3, 8, 8)), r"takes images \(B, 1, H, W\)"),
        (lambda: AdvMoE(MoESmallCNN(), alpha=-1), "alpha=-1"),
        (lambda: AdvMoE(MoESmallCNN(), beta=-1), "beta=-1"),
        (lambda: AdvMoE(MoESmallCNN(), balance="loss"), "balance='loss' is unknown: choose one of class_mod"),
        (lambda: AdvMoE(MoESmallCNN(num_classes=2, experts=3), num_classes=2), "deals 2 classes out to 3 experts"),
        (lambda: AdvMoE(MoESmallCNN(), FGSM()), "no gradient at x itself"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_other_networks_and_accumulation_are_refused() -> None:
    with pytest.raises(TypeError, match="net is a SmallCNN"):
        AdvMoE(SmallCNN())
    with pytest.raises(Exception, match="manual optimization"):
        Trainer(max_epochs=1, gradient_clip_val=1.0, **QUIET).fit(AdvMoE(MoESmallCNN()), loader())


# The losses ------------------------------------------------------------------------------------------------------------


def logs(*rows: tuple[float, ...]) -> Tensor:
    """Scores whose softmax is as given."""
    return torch.tensor(rows, dtype=torch.float64).log()


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_balances_by_pencil() -> None:
    scores = logs((0.8, 0.2), (0.6, 0.4), (0.1, 0.9))
    y = torch.tensor([4, 7, 1])  # experts 0, 1, 1
    assert expert_targets(y, 2).tolist() == [0, 1, 1]
    assert class_balance(scores, y).item() == pytest.approx(-math.log(0.8 * 0.4 * 0.9) / 3, abs=1e-12)
    # the mean gate is (0.5, 0.5)
    assert entropy_balance(scores).item() == pytest.approx(0, abs=1e-12)
    # f = (2/3, 1/3), P = (1/2, 1/2)
    assert switch_balance(scores).item() == pytest.approx(1, abs=1e-12)
    uneven = scores[:2]  # f = (1, 0), P = (0.7, 0.3)
    assert entropy_balance(uneven).item() == pytest.approx(math.log(2) + 0.7 * math.log(0.7) + 0.3 * math.log(0.3), abs=1e-12)
    assert switch_balance(uneven).item() == pytest.approx(1.4, abs=1e-12)
    one = torch.tensor([[0.0, -1e4]], dtype=torch.float64)
    assert entropy_balance(one).item() == pytest.approx(math.log(2), abs=1e-12)


def test_shares_have_no_gradient_and_means_have() -> None:
    scores = logs((0.8, 0.2), (0.6, 0.4)).requires_grad_()
    (by_score,) = torch.autograd.grad(switch_balance(scores), scores)
    # 2 * f_0 * d mean(p_0): 2 * p_0 p_1 / 2
    assert torch.allclose(by_score, torch.tensor([[0.16, -0.16], [0.24, -0.24]], dtype=torch.float64), atol=1e-12)


def test_mixed_labels_share_the_experts() -> None:
    y = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(expert_targets(y, 2), torch.tensor([[0.8, 0.2], [0.0, 1.0]], dtype=torch.float64))
    scores = logs((0.8, 0.2), (0.6, 0.4))
    by_hand = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2) + math.log(0.4)) / 2
    assert class_balance(scores, y).item() == pytest.approx(by_hand, abs=1e-12)


def test_router_loss_and_the_attacks_objective_by_pencil() -> None:
    p, q = ((0.8, 0.2), (0.6, 0.4)), ((0.5, 0.5), (0.3, 0.7))
    divergences = [kl(a, b) for a, b in zip(p, q, strict=True)]
    found = router_loss(logs(*p), logs(*q), torch.tensor(0.25, dtype=torch.float64), 3.0, 2.0)
    assert found.item() == pytest.approx(0.75 + sum(divergences), abs=1e-12)
    u, v = ((0.1, 0.2, 0.7), (0.3, 0.3, 0.4)), ((0.3, 0.3, 0.4), (0.2, 0.2, 0.6))
    both = routed_divergence(torch.cat([logs(*v), logs(*q)], 1), logs(*u), logs(*p))
    assert both.tolist() == pytest.approx([kl(a, b) + d for a, b, d in zip(u, v, divergences, strict=True)], abs=1e-12)


# The method ------------------------------------------------------------------------------------------------------------


class Shift(Attack):
    """Brighter by eps, whatever the network."""

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        return problem.project(x + problem.eps)


def doubles(n: int = 24, batch_size: int = 8) -> DataLoader[Any]:
    x, y = loader(n, batch_size).dataset.tensors
    return DataLoader(TensorDataset(x.double(), y), batch_size)


def small(**more: Any) -> MoESmallCNN:
    torch.manual_seed(0)
    return MoESmallCNN(width=8, router_width=4, **more)


@pytest.mark.parametrize("balance", ["class_mod", "entropy", "switch"])
def test_steps_in_turns_by_hand(balance: str) -> None:
    """Three batches with momentum and weight decay in float64, against a plain loop on the same network."""
    net = small().double()
    ours = copy.deepcopy(net)
    alpha, beta, lr = 3.0, 2.0, 0.1
    method = AdvMoE(
        ours,
        Shift(0.1, random_start=True),
        alpha,
        beta,
        balance=balance,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    ).double()
    Trainer(max_epochs=1, limit_val_batches=0, precision="64-true", **QUIET).fit(method, doubles())

    net.train()
    parts = [p for n, p in net.named_parameters() if not n.startswith("router")], [*net.router.parameters()]
    experts, router = (torch.optim.SGD(part, lr=lr, momentum=0.9, weight_decay=0.01) for part in parts)
    for x, y in doubles():
        x_adv = (x + 0.1).clamp(max=1)
        logits, logits_adv = net(x), net(x_adv)
        loss = F.cross_entropy(logits, y) + beta * kl_divergence(logits_adv, logits).mean()
        experts.zero_grad()
        loss.backward()
        experts.step()
        scores, scores_adv = net.router(x), net.router(x_adv)
        gates = scores.softmax(1)
        if balance == "class_mod":
            even = F.cross_entropy(scores, y % 2)
        elif balance == "entropy":
            even = math.log(2) + (gates.mean(0) * gates.mean(0).log()).sum()
        else:
            taken = F.one_hot(scores.argmax(1), 2).double().mean(0)
            even = 2 * (taken * gates.mean(0)).sum()
        router.zero_grad()
        (alpha * even + beta * kl_divergence(scores_adv, scores).mean()).backward()
        router.step()
    for (name, a), b in zip(ours.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-11, rtol=1e-9), name


class Start(PGD):
    """Keeps where it began and where it ended."""

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        memory: dict[str, Tensor] = {}
        self.begin = x_adv = problem.random_start(self.random_start)
        for _ in range(self.steps):
            direction, _ = self.direction(problem, x_adv, memory)
            x_adv = problem.project(x_adv + self.step_size * problem.steepest(direction))
        return x_adv


def test_the_attack_by_hand() -> None:
    """Two steps along the sign of the gradient of both divergences, from targets that stay."""
    net = small().double()
    net(torch.rand(16, 1, 8, 8, dtype=torch.float64))
    method = AdvMoE(net, Start(0.1, 0.07, 2, random_start="normal"), optimizer=sgd)
    x, y = doubles().dataset.tensors
    x_adv = method.craft((x, y)).x_adv
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    begin = method.attack.begin
    assert 0 < (begin - x).abs().max() < 0.006
    net.eval()
    with torch.no_grad():
        scores = net.signals(x)
        logits = net.routed(x, scores)
    by_hand = begin
    for _ in range(2):
        by_hand = by_hand.detach().requires_grad_()
        at = net.signals(by_hand)
        found = (kl_divergence(net.routed(by_hand, at), logits) + kl_divergence(at, scores)).sum()
        (gradient,) = torch.autograd.grad(found, by_hand)
        by_hand = (by_hand + 0.07 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert torch.allclose(x_adv, by_hand, atol=1e-12)
    with torch.no_grad():
        end, near = net.signals(x_adv), net.signals(begin)
        rise = kl_divergence(end, scores).mean() / kl_divergence(near, scores).mean()
    assert rise > 10


def test_each_loss_reaches_its_own_part() -> None:
    net = small()
    method = AdvMoE(net, optimizer=sgd)
    x, y = loader().dataset.tensors
    example = Example(x, y, torch.arange(len(x)), (x + 0.1).clamp(max=1))
    router = {name for name, _ in net.named_parameters() if name.startswith("router.")}
    for loss, reached in ((method.router_loss, router), (method.loss, {n for n, _ in net.named_parameters()} - router)):
        net.zero_grad()
        loss(example).backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None} == reached


def test_the_second_attack_sees_the_new_experts_and_the_old_router() -> None:
    class Watched(AdvMoE):
        def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
            self.seen.append({name: p.detach().clone() for name, p in self.net.named_parameters()})
            return super().craft(batch, eps)

    method = Watched(small(), optimizer=sgd)
    method.seen = []
    Trainer(max_steps=2, limit_val_batches=0, **QUIET).fit(method, loader())
    assert len(method.seen) == 4
    for turn, part in enumerate(("experts", "router", "experts")):
        before, after = method.seen[turn : turn + 2]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and {name.startswith("router.") for name in moved} == {part == "router"}


def test_cost_and_optimizers_of_their_own() -> None:
    class Counted(MoESmallCNN):
        routers = paths = backwards = 0

        def signals(self, x: Tensor) -> Tensor:
            self.routers += 1
            return super().signals(x)

        def routed(self, x: Tensor, signals: Tensor) -> Tensor:
            self.paths += 1
            logits = super().routed(x, signals)
            if logits.requires_grad:
                logits.register_hook(self.count)
            return logits

        def count(self, gradient: Tensor) -> None:
            self.backwards += 1

    net = Counted(width=8, router_width=4)
    method = AdvMoE(net, optimizer=sgd)
    method._checked = {True, False}
    trainer = Trainer(max_epochs=2, limit_val_batches=0, **QUIET)
    trainer.fit(method, loader())
    assert (net.paths, net.backwards, net.routers) == (6 * 8, 6 * 6, 6 * 10)
    assert trainer.global_step == 6, "a batch is one step"
    groups = [{id(p) for g in optimizer.param_groups for p in g["params"]} for optimizer in trainer.optimizers]
    assert groups[1] == {id(p) for p in net.router.parameters()} and not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}
    attack = method.attack
    assert (attack.eps, attack.step_size, attack.steps, attack.random_start) == (8 / 255, 5 / 255, 2, "normal")


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers))


@pytest.mark.parametrize(
    ("schedule", "more", "expected"),
    [
        (Cosine(), {"max_epochs": 2}, [0.05 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]),
        (Cosine(), {"max_epochs": 5, "max_steps": 4}, [0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]),
        (MultiStep([1]), {"max_epochs": 2}, [0.1] * 3 + [0.01] * 3),
    ],
)
def test_both_learning_rates_follow_the_schedule(schedule: Any, more: dict[str, Any], expected: list[float]) -> None:
    rates = Rates()
    method = AdvMoE(small(), PGD(steps=1, random_start="normal"), optimizer=sgd, schedule=schedule)
    Trainer(limit_val_batches=0, callbacks=[rates], **more, **QUIET).fit(method, loader())
    for part in (0, 1):
        assert [rate[part] for rate in rates.seen] == pytest.approx(expected)


def test_an_average_follows_once_a_batch_over_experts_and_router() -> None:
    net, average = small(), EMA(0.05)
    before = copy.deepcopy(net.state_dict())
    method = AdvMoE(net, optimizer=sgd)
    Trainer(max_steps=1, limit_val_batches=0, callbacks=[average], **QUIET).fit(method, loader())
    for name, p in net.named_parameters():
        assert torch.allclose(average.weights[f"net.{name}"], 0.05 * before[name] + 0.95 * p, atol=1e-6), name
    assert average.progress() == {"updates": 1}


@pytest.mark.parametrize("objective", [None, "ce"])
def test_mixed_labels_and_another_objective_train(objective: Any) -> None:
    x, y = loader().dataset.tensors
    mixed = 0.5 * (F.one_hot(y, 10) + F.one_hot(y.flip(0), 10)).float()
    method = AdvMoE(small(), PGD(0.1, steps=2, random_start="normal", objective=objective), optimizer=sgd)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(method, DataLoader(TensorDataset(x, mixed), 8))
    assert trainer.callback_metrics["train/loss"].isfinite() and trainer.callback_metrics["train/router_loss"].isfinite()


@pytest.mark.slow
def test_the_benchmark_counts_what_each_way_computes(tmp_path: Path) -> None:
    file = tmp_path / "moe.json"
    command = "--pairs 1 --batch-size 4 --size 16 --json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.moe", *command.split(), str(file)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    dense, ours, naive, grouped = (report[name]["flops"] for name in ("dense", "sorted", "masked", "per image"))
    assert ours == grouped < 0.4 * dense and naive > 1.5 * ours
    assert all(report[name][clock]["ratio_median"] > 0 for name in ("sorted", "masked") for clock in ("wall", "cpu"))
