"""ELLE and ELLE-A: the linearity error by hand, where its points lie, and when the weight rises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import AWP, FGSM, NoisyFGSM
from robust_pl.functional.regularizers import linearity_error
from robust_pl.methods import ELLE, ELLEA
from robust_pl.methods.fast.elle import TripleExample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd

EPS = 0.1


def batch(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(n, 1, 8, 8, generator=generator)
    return x, torch.randint(10, (n,), generator=generator), torch.arange(n)


def test_linearity_error_by_hand() -> None:
    """(2.5 - 0.75 * 1 - 0.25 * 3)^2 = 1, and its derivatives 2 * 1 * (-0.75, -0.25, 1); a linear loss has none."""
    points = [torch.tensor([value, value], dtype=torch.float64, requires_grad=True) for value in (1.0, 3.0, 2.5)]
    share = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = linearity_error(*points, share)
    assert torch.equal(found, torch.tensor([1.0, 0.0], dtype=torch.float64))
    for gradient, expected in zip(torch.autograd.grad(found[0], points), (-1.5, -0.5, 2.0), strict=True):
        assert torch.allclose(gradient, torch.tensor([expected, 0.0], dtype=torch.float64))


class Quadratic(nn.Module):
    """Two logits, (0, sum a_i x_i^2 / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = (self.a * x.flatten(1).square()).sum(1) / 2
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradient_by_hand(mixed: bool) -> None:
    """Cross-entropies of (0, z) are log(1 + e^z) - y z, and the derivatives of z by a are squared pixels over 2."""
    method = ELLE(Quadratic(), FGSM(EPS), lmbda=50.0, num_classes=2)
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = torch.tensor([0, 1, 1, 0, 1])
    target = hard.double()
    y: Tensor = hard
    if mixed:
        y = 0.6 * F.one_hot(hard, 2).double() + 0.2
        target = 0.6 * target + 0.2
    example = method.craft((x, y, torch.arange(5)))
    a = method.net.a.detach()

    def at(point: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its derivative by a."""
        halves = point.flatten(1).square() / 2
        z = halves @ a
        return torch.log1p(z.exp()) - label * z, (torch.sigmoid(z) - label).unsqueeze(1) * halves

    (first, by_first), (second, by_second), (between, by_between) = (at(p, hard.double()) for p in example.points.unbind(1))
    share = example.share
    off = between - (1 - share) * first - share * second
    by_off = by_between - (1 - share).unsqueeze(1) * by_first - share.unsqueeze(1) * by_second
    plain, by_plain = at(example.x_adv, target)
    found = method.loss(example)
    assert found.item() == pytest.approx((plain.mean() + 50 * off.square().mean()).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(found, method.net.a)
    part = 50 * (2 * off.unsqueeze(1) * by_off).mean(0)
    assert torch.allclose(gradient, by_plain.mean(0) + part, atol=1e-12) and part.abs().max() > 1e-4
    assert torch.allclose(example.errors, off.square(), atol=1e-12)


def test_the_attack_sees_hard_labels() -> None:
    """z = 8 at x, so that smoothed cross-entropy of class 1 falls where the hard one rises."""
    net = Quadratic()
    with torch.no_grad():
        net.a.fill_(4.0)
    x, index = torch.ones(1, 1, 2, 2, dtype=torch.float64) - EPS, torch.arange(1)
    smooth = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    down, up = (torch.full_like(x, 1 - 2 * EPS), torch.ones_like(x))
    assert torch.allclose(ELLE(net, FGSM(EPS), num_classes=2).craft((x, smooth, index)).x_adv, down)
    assert torch.allclose(ELLE(net, FGSM(EPS, objective="ce"), num_classes=2).craft((x, smooth, index)).x_adv, up)


def test_points_lie_on_a_line_through_the_ball() -> None:
    method = ELLE(SmallCNN(width=4), FGSM(EPS))
    x, y, index = batch(64)
    x = x.round()  # at the corners of the box, which the points leave
    example = method.craft((x, y, index))
    first, second, between = example.points.unbind(1)
    share = example.share.view(-1, 1, 1, 1)
    assert torch.allclose(between, first + share * (second - first), atol=1e-6)
    for point in (first, second):
        noise = point - x
        assert noise.abs().max() <= EPS + 1e-6 and noise.abs().max() > 0.98 * EPS and abs(noise.mean()) < 0.01
    assert abs(torch.corrcoef(torch.stack([(first - x).flatten(), (second - x).flatten()]))[0, 1]) < 0.1
    assert example.points.min() < -0.09 and example.points.max() > 1.09
    assert example.share.shape == (64,) and 0 <= example.share.min() < 0.1 and 0.9 < example.share.max() < 1
    assert (example.x_adv.min(), example.x_adv.max()) == (0, 1)


def test_points_have_the_radius_of_their_sample() -> None:
    eps = torch.linspace(0.01, 0.1, 8).view(8, 1, 1, 1)
    for example in (
        ELLE(SmallCNN(width=4), FGSM(EPS)).craft(batch(), eps),
        ELLE(SmallCNN(width=4), FGSM(eps)).craft(batch()),
    ):
        largest = (example.points[:, :2] - batch()[0].unsqueeze(1)).abs().amax((1, 2, 3, 4))
        assert (largest <= eps.flatten() + 1e-6).all() and (largest > 0.9 * eps.flatten()).all()


def test_points_are_drawn_from_the_attacks_stream() -> None:
    method = ELLE(SmallCNN(width=4), FGSM(EPS, seed=3))
    before = torch.get_rng_state()
    first, second = method.craft(batch()), method.craft(batch())
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first.points, second.points)
    again = ELLE(SmallCNN(width=4), FGSM(EPS, seed=3)).craft(batch())
    assert torch.equal(again.points, first.points) and torch.equal(again.share, first.share)


@pytest.mark.parametrize("track", [True, False])
def test_the_points_pass_may_leave_batch_norm_alone(track: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(1, momentum=0.5), nn.Flatten(), nn.Linear(64, 10))
    method = ELLE(net, FGSM(EPS, bn_mode="train_no_track"), track_statistics=track)
    example = method.craft(batch())
    assert net[0].num_batches_tracked == 0
    mean = net[0].running_mean.clone()
    method.loss(example)
    mean = 0.5 * mean + 0.5 * example.x_adv.mean()
    if track:
        mean = 0.5 * mean + 0.5 * example.points.mean()
    assert torch.allclose(net[0].running_mean, mean, atol=1e-6)
    assert net[0].num_batches_tracked == 1 + track


def test_default_attack_is_one_step_of_eps_from_x() -> None:
    method = ELLE(SmallCNN(width=4))
    attack = method.attack
    assert isinstance(attack, FGSM) and (attack.eps, attack.step_size, attack.random_start) == (8 / 255, None, False)
    assert attack.bn_mode == "train" and method.lmbda == 1000 and ELLEA(SmallCNN()).lmbda == 4000
    x = batch()[0]
    assert torch.allclose((method.craft(batch()).x_adv - x).abs(), torch.full_like(x, 8 / 255), atol=1e-6)


def test_the_benchmarks_step_is_a_noisy_fgsm() -> None:
    """From U(-eps, eps), cut to the box, a step of 1.25 eps that nothing but the box cuts."""
    method = ELLE(SmallCNN(width=4), NoisyFGSM(EPS, k=1, step_size=1.25 * EPS))
    x, y, index = batch(64)
    example = method.clean((x, y, index))
    attacked = method.run_attack(example)
    assert EPS * 0.98 < (attacked.start - x).abs().max() <= EPS + 1e-6
    assert torch.allclose((attacked.x_adv - attacked.start).abs(), torch.full_like(x, 1.25 * EPS), atol=1e-6)
    assert 2.2 * EPS < (attacked.x_adv - x).abs().max() <= 2.25 * EPS + 1e-6


def by_history(errors: list[float], top: float, sensitivity: float, decay: float) -> list[float]:
    """Weights after each step, from the whole history."""
    history: list[float] = []
    weight, weights = 0.0, []
    for error in errors:
        past = torch.tensor(history, dtype=torch.float64)
        rises = len(history) > 2 and error > past.mean() + sensitivity * past.std(unbiased=False)
        weight = top if rises else decay * weight
        weights.append(weight)
        history.append(error)
    return weights


def adaptive(**more: Any) -> ELLEA:
    return ELLEA(SmallCNN(width=4), FGSM(EPS), **{"lmbda": 400.0, **more})


@pytest.mark.parametrize(("sensitivity", "decay"), [(2.0, 0.99), (0.0, 0.5), (1.0, 0.0)])
def test_the_weight_follows_the_whole_history(sensitivity: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    errors = (1000 + torch.rand(60, generator=generator, dtype=torch.float64) ** 8).tolist()  # a small spread far from 0
    expected = by_history(errors, 400.0, sensitivity, decay)
    method = adaptive(sensitivity=sensitivity, decay=decay)
    assert method.weight() == 0
    found = []
    for error in errors:
        x, y, index = batch(4)
        method.after_step(TripleExample(x, y, index, errors=error + torch.tensor([-1.0, 1.0, 2.0, -2.0], dtype=torch.float64)))
        found.append(method.weight().item())
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < sum(w == 400 for w in expected) < 40 and expected[:3] == [0, 0, 0]


def test_a_step_is_judged_before_it_joins_the_history() -> None:
    """3 past values of 1: the mean is 1 and the deviation 0, so that 1.1 is above; with it the limit would be 1.11."""
    x, y, index = batch(1)
    method = adaptive()
    for error in (1.0, 1.0, 1.0, 1.1):
        assert method.weight() == 0
        method.after_step(TripleExample(x, y, index, errors=torch.tensor([error])))
    assert method.weight() == 400


def test_the_weight_waits_for_three_steps() -> None:
    x, y, index = batch(1)
    method = adaptive()
    for error, weight in ((1.0, 0), (1.0, 0), (5.0, 0), (50.0, 400)):
        method.after_step(TripleExample(x, y, index, errors=torch.tensor([error])))
        assert method.weight() == weight


def test_the_history_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_pl.methods.fast.elle_a.mean_over_ranks", lambda own: (own + 5) / 2)
    method = adaptive()
    method.after_step(TripleExample(*batch(4), errors=torch.tensor([1.0, 2.0, 3.0, 6.0])))
    assert method.mean == 4


def test_the_adaptive_weight_is_that_of_the_loss() -> None:
    method = adaptive().eval()
    example = method.craft(batch())
    plain = F.cross_entropy(method(example.x_adv), example.y)
    assert torch.equal(method.loss(example), plain)
    method.current.fill_(3.0)
    assert method.loss(example).item() == pytest.approx((plain + 3 * example.errors.mean()).item(), rel=1e-5)


def test_errors_are_those_of_the_step_when_awp_asks_again() -> None:
    example = adaptive().craft(batch())
    method = adaptive()
    method.loss(example)
    kept = example.errors
    with torch.no_grad():
        method.net.linear.weight.mul_(5)
    method.loss(example)
    assert example.errors is kept


@pytest.mark.parametrize("callbacks", [[], [AWP(0.01)]])
def test_the_history_grows_once_a_step_and_is_saved(callbacks: list[Any], tmp_path: Path) -> None:
    method = ELLEA(SmallCNN(width=4), FGSM(EPS), sensitivity=0.0, optimizer=sgd)
    trainer = Trainer(max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(method, loader(n=32))
    assert method.seen == 4 and method.mean > 0 and method.squares > 0
    assert trainer.callback_metrics["train/lmbda"] == method.weight()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    for name in ("current", "seen", "mean", "squares"):
        assert torch.equal(saved[name], getattr(method, name))
    assert saved["mean"].dtype == saved["squares"].dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ELLE(SmallCNN(), lmbda=-1), "lmbda=-1 must be at least 0"),
        (lambda: ELLE(SmallCNN(), FGSM(0.5, norm="l2")), "ELLE draws points of the linf ball and attack.norm is 'l2'"),
        (lambda: ELLEA(SmallCNN(), FGSM(0.5, norm="l2")), "ELLEA draws points"),
        (lambda: ELLEA(SmallCNN(), sensitivity=-1), "sensitivity=-1"),
        (lambda: ELLEA(SmallCNN(), decay=1.5), r"decay=1.5 is what remains .* \[0, 1\]"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
