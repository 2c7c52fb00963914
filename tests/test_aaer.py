"""AAER: its regulariser by numbers worked out by hand, its loss by the paper's equations, and its two starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import AWP, FGSM, DeepFool, NoisyFGSM, UnanimousFGSM
from robust_pl.functional.regularizers import abnormality
from robust_pl.methods import AAER
from robust_pl.methods.fast.aaer import ComparedExample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd

EPS = 0.1
DROP = [0.5, -0.2, 0.1, -1.0]
SHIFT = [4.0, 1.0, 2.0, 3.0]


def vector(values: list[Any], grad: bool = True) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_abnormality_by_hand() -> None:
    """Two of four: D = 0.3, V_A = 3, V_N = 2, so 2 / 4 * (1.5 * 0.3 + 0.2 * 1) = 0.325."""
    drop, shift = vector(DROP), vector(SHIFT)
    found = abnormality(drop, shift, torch.tensor([True, False, True, False]), 1.5, 0.2)
    assert found.item() == pytest.approx(0.325, abs=1e-12)
    by_drop, by_shift = torch.autograd.grad(found, (drop, shift))
    assert torch.allclose(by_drop, vector([0.375, 0, 0.375, 0], False))  # 2 / 4 * 1.5 / 2
    assert torch.allclose(by_shift, vector([0.05, 0, 0.05, 0], False))  # 2 / 4 * 0.2 / 2; V_N is held fixed


def test_a_smaller_shift_of_abnormal_samples_is_not_rewarded() -> None:
    drop, shift = vector(DROP), vector([1.0, 4.0, 2.0, 3.0])
    found = abnormality(drop, shift, torch.tensor([True, False, True, False]), 1.5, 0.2)
    assert found.item() == pytest.approx(0.225, abs=1e-12)
    assert not torch.autograd.grad(found, shift)[0].any()


@pytest.mark.parametrize("abnormal", [True, False])
def test_one_empty_set_leaves_cross_entropy_alone(abnormal: bool) -> None:
    drop, shift = vector(DROP), vector(SHIFT)
    found = abnormality(drop, shift, torch.full((4,), abnormal), 1.5, 0.2)
    assert found.item() == 0
    for gradient in torch.autograd.grad(found, (drop, shift)):
        assert torch.equal(gradient, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("split", [2, 1, 3])
def test_the_mean_over_processes_is_that_of_all_samples(split: int) -> None:
    """Also where one process has no abnormal sample, or none but such."""
    drop, shift, abnormal = vector(DROP), vector(SHIFT), torch.tensor([True, False, False, True])
    whole = abnormality(drop, shift, abnormal, 1.5, 0.2)
    assert whole.item() == pytest.approx(0.5 * (-1.5 * 0.25 + 0.2 * 2))
    parts = [slice(0, split), slice(split, 4)]
    sums: list[Tensor] = []

    def collect(local: Tensor) -> Tensor:
        sums.append(local)
        return local

    for part in parts:
        abnormality(drop[part], shift[part], abnormal[part], 1.5, 0.2, collect)
    mean = torch.stack(sums).mean(0)
    pieces = [abnormality(drop[part], shift[part], abnormal[part], 1.5, 0.2, lambda _: mean) for part in parts]
    together = torch.stack(pieces).mean()
    assert together.item() == pytest.approx(whole.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(together, (drop, shift)), torch.autograd.grad(whole, (drop, shift)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


class Waves(nn.Module):
    """So curved that a step of the attack overshoots for some samples; without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(20)
            self.first, self.last = nn.Linear(16, 16).double(), nn.Linear(16, 4).double()
            with torch.no_grad():
                self.first.weight.mul_(40)
                self.last.weight.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).sin())


def batch(n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (n,), generator=generator), torch.arange(n)


def paper(net: nn.Module, example: ComparedExample, start: Tensor, l2: float, l3: float, attached: bool = False) -> Tensor:
    """The equations, sample by sample: log-sum-exp minus the right logit, and sets as lists."""
    with torch.no_grad():
        z0 = net(start)
    z = net(example.x_adv)
    labels = example.y.argmax(1) if example.y.is_floating_point() else example.y
    before = [torch.logsumexp(row, 0) - row[c] for row, c in zip(z0, labels, strict=True)]
    after = [torch.logsumexp(row, 0) - row[c] for row, c in zip(z, labels, strict=True)]
    abnormal = [i for i in range(len(z)) if before[i] > after[i]]
    normal = [i for i in range(len(z)) if before[i] <= after[i]]
    assert abnormal and normal
    spread = [(z0[i] - z[i]).pow(2).sum() for i in range(len(z))]
    v_a = sum(spread[i] for i in abnormal) / len(abnormal)
    v_n = sum(spread[i].item() for i in normal) / len(normal)
    d = sum(before[i] - (after[i] if attached else after[i].detach()) for i in abnormal) / len(abnormal)
    penalty = len(abnormal) / len(z) * (l2 * d + l3 * max(v_a - v_n, 0 * v_a))
    return torch.nn.functional.cross_entropy(z, example.y) + 0.7 * penalty


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("attack", [lambda: NoisyFGSM(EPS), lambda: FGSM(EPS, 1.25 * EPS, random_start=True, bn_mode="train")])
def test_loss_and_gradient_by_the_equations(attack: Callable[[], Any], mixed: bool, attached: bool) -> None:
    method = AAER(Waves(), attack(), 0.7, 1.5, 0.4, attached, num_classes=4)
    x, y, index = batch()
    if mixed:
        y = 0.6 * F.one_hot(y, 4).double() + 0.1
    seen: list[Tensor] = []
    hook = method.net.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().clone()))
    example = method.craft((x, y, index))
    hook.remove()
    (start,) = seen
    assert not example.start_logits.requires_grad
    found, expected = method.loss(example), paper(method.net, example, start, 1.5, 0.4, attached)
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    parameters = list(method.net.parameters())
    gradients = torch.autograd.grad(found, parameters)
    for a, b in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_the_excess_matters_in_the_test_above() -> None:
    method = AAER(Waves(), NoisyFGSM(EPS), 0.7, 1.5, 0.4, num_classes=4)
    example = method.craft(batch())
    full = method.loss(example)
    method.output_weight = 0.0
    assert (full - method.loss(example)).item() > 1e-3


def test_lambda_2_has_no_gradient_unless_it_is_attached() -> None:
    def gradient(loss_weight: float, attached: bool) -> tuple[float, Tensor]:
        method = AAER(Waves(), NoisyFGSM(EPS), 1.0, loss_weight, 0.15, attached, num_classes=4)
        loss = method.loss(method.craft(batch()))
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(method.net.parameters()))])

    (without, base), (value, detached), (same, attached) = gradient(0, False), gradient(3, False), gradient(3, True)
    assert value > without and value == pytest.approx(same)
    assert torch.equal(base, detached) and (attached - base).abs().max() > 1e-3


def test_samples_stay_abnormal_when_a_weight_perturbation_asks_again() -> None:
    method = AAER(Waves(), NoisyFGSM(EPS), num_classes=4)
    example = method.craft(batch())
    assert example.abnormal is None
    first = method.loss(example)
    kept = example.abnormal.clone()
    assert torch.equal(method.loss(example), first)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    method.loss(example)
    assert torch.equal(example.abnormal, kept)
    example.abnormal = None
    method.loss(example)
    assert not torch.equal(example.abnormal, kept)  # the weights did move far enough to tell


def test_the_attack_sees_hard_labels() -> None:
    """A network this sure of a class would lower smoothed cross-entropy by being less sure of it."""
    x, y, index = batch()
    with torch.no_grad():
        sure = Waves()
        sure.last.weight.mul_(20)
        y = sure(x).argmax(1)
    smooth = 0.4 * F.one_hot(y, 4).double() + 0.15
    expected = AAER(sure, NoisyFGSM(EPS), num_classes=4).craft((x, y, index)).x_adv
    assert torch.equal(AAER(sure, NoisyFGSM(EPS), num_classes=4).craft((x, smooth, index)).x_adv, expected)
    other = AAER(sure, NoisyFGSM(EPS, objective="ce"), num_classes=4).craft((x, smooth, index)).x_adv
    assert not torch.allclose(other, expected)


def test_counts_and_means_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process with samples of normal ones alone, shifted by nothing: n / B falls to a half, and V_N falls."""
    method = AAER(Waves(), NoisyFGSM(EPS), num_classes=4)
    example = method.craft(batch())
    method.loss(example)
    monkeypatch.setattr("robust_pl.methods.fast.aaer.mean_over_ranks", lambda own: (own + own.new_tensor([0, 24, 0, 0])) / 2)
    a, z = example.abnormal, method(example.x_adv)
    drop = F.cross_entropy(example.start_logits, example.y, reduction="none") - F.cross_entropy(z, example.y, reduction="none")
    shift = (example.start_logits - z).square().sum(1)
    normal = shift[~a].sum() / ((~a).sum() + 24)
    both = drop[a].sum() / a.sum() * 2, shift[a].sum() / a.sum() * 2  # this process's part of a mean of two
    expected = F.cross_entropy(z, example.y) + a.sum().double() / 48 * (1.5 * both[0] + 0.15 * (both[1] - normal))
    assert both[1] / 2 > normal and method.loss(example).item() == pytest.approx(expected.item(), abs=1e-10)


def test_with_awp_the_attack_runs_once_a_step() -> None:
    method = AAER(SmallCNN(width=4), NoisyFGSM(EPS), optimizer=sgd)
    Trainer(max_epochs=1, callbacks=[AWP(0.01)], limit_val_batches=0, **QUIET).fit(method, loader())
    assert (method.attack.forwards, method.attack.backwards) == (24, 24)


def test_n_aaer_is_the_default_and_begins_at_twice_eps() -> None:
    attack = AAER(SmallCNN()).attack
    assert isinstance(attack, NoisyFGSM) and (attack.eps, attack.k, attack.step_size, attack.bn_mode) == (
        8 / 255,
        2,
        None,
        "train",
    )
    method = AAER(SmallCNN())
    assert (method.count_weight, method.loss_weight, method.output_weight, method.attached) == (1.0, 1.5, 0.15, False)


@pytest.mark.parametrize("attack", [UnanimousFGSM(EPS), DeepFool(EPS, norm="linf")])
def test_the_attack_must_begin_with_a_pass_at_one_start(attack: Any) -> None:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"AAER compares .* {type(attack).__name__} takes none: choose FGSM or NoisyFGSM"):
        AAER(SmallCNN(width=4), attack).craft((x, torch.arange(4), torch.arange(4)))


@pytest.mark.parametrize("field", ["count_weight", "loss_weight", "output_weight"])
def test_bad_arguments(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}=-1 must be at least 0"):
        AAER(SmallCNN(), **{field: -1})
