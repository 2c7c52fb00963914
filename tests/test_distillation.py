"""Teachers, and the distillations that the library carries first: their losses, their rules, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from robust_pl.callbacks import EMA, PGD
from robust_pl.data import DigitsDataModule
from robust_pl.functional.distillation import (
    balance_entropies,
    balance_losses,
    class_temperatures,
    distillation,
    entropy,
    reduce_kl,
)
from robust_pl.methods import ABSLD, BMTARD, IGDM, MTARD, RSLAD, AdaAD, Method, MultiStep
from robust_pl.nets import Normalize, SmallCNN, Teacher

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}
ATTACK = {"eps": 0.1, "steps": 2, "random_start": "normal"}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def net(seed: int = 0, width: int = 4, classes: int = 10) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN(classes, width=width)


def digits(**settings: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"batch_size": 64, **settings})


def fit(method: Method, data: DigitsDataModule | None = None, **settings: Any) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = Trainer(**{"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, **QUIET, **settings})
    trainer.fit(method, data or digits())
    return trainer


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(z: list[float], t: float = 1.0) -> list[float]:
    e = [math.exp(v / t) for v in z]
    return [v / sum(e) for v in e]


# Losses and rules, by hand ---------------------------------------------------------------------------------------------


def test_distillation_and_its_reductions() -> None:
    s, t = [[1.0, -2.0, 0.5], [0.0, 0.3, -1.0]], [[2.0, 0.0, -1.0], [-0.5, 0.5, 1.5]]
    student, teacher = torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    for temperature in (1.0, 5.0):
        hand = [temperature**2 * kl(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(s, t, strict=True)]
        each = distillation(student, teacher, temperature)
        assert each.tolist() == pytest.approx(hand, abs=1e-12)
        assert reduce_kl(each, 3, "batchmean").item() == pytest.approx(sum(hand) / 2, abs=1e-12)
        mean = reduce_kl(each, 3, "mean").item()
        assert mean == pytest.approx(sum(hand) / 6, abs=1e-12)
    # torch's own reductions, which public codes use
    log_q, p = student.log_softmax(1), teacher.softmax(1)
    for reduction in ("batchmean", "mean"):
        assert torch.allclose(reduce_kl(distillation(student, teacher), 3, reduction), F.kl_div(log_q, p, reduction=reduction))


def test_mtard_weights_over_three_steps() -> None:
    first, rate, beta = [0.8, 0.2], 0.025, 1.0
    steps = [[0.8, 0.2], [0.6, 0.19], [0.5, 0.08]]
    by_hand = [0.5, 0.5]
    weights, start = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor(first, dtype=torch.float64)
    for losses in steps:
        r = [(now / begin) ** beta for now, begin in zip(losses, first, strict=True)]
        by_hand[1] = by_hand[1] - rate * (by_hand[1] - r[1] / (r[0] + r[1]))
        by_hand[0] = 1 - by_hand[1]
        weights = balance_losses(weights, torch.tensor(losses, dtype=torch.float64), start, rate, beta)
        assert weights.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert weights[0] > 0.5  # 0.5 / 0.8 is more of what there was than 0.08 / 0.2, after 0.75 against 0.95
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    # B-MTARD writes it with losses divided by their mean
    relative = torch.tensor(losses, dtype=torch.float64) / start
    rho = relative / relative.mean()
    other = weights - rate * (weights - rho / rho.sum())
    assert torch.allclose(balance_losses(weights, torch.tensor(losses, dtype=torch.float64), start, rate), other)


def test_bmtard_temperatures() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    hand = [-sum(p * math.log(p) for p in softmax(row)) for row in ([2.0, 0.0], [0.0, 1.0])]
    assert entropy(logits).tolist() == pytest.approx(hand, abs=1e-12)
    temperatures = torch.ones(2, dtype=torch.float64)
    for expected in ([1.0, 1.1], [1.0, 1.2]):  # the robust teacher's entropy is larger, and its temperature is at the floor
        temperatures = balance_entropies(temperatures, torch.tensor([1.5, 0.2], dtype=torch.float64), 0.1)
        assert temperatures.tolist() == pytest.approx(expected, abs=1e-12)
    temperatures = balance_entropies(temperatures, torch.tensor([0.2, 1.5], dtype=torch.float64), 0.1)
    assert temperatures.tolist() == pytest.approx([1.1, 1.1], abs=1e-12)
    temperatures = balance_entropies(temperatures, torch.tensor([0.7, 0.7], dtype=torch.float64), 0.1)
    assert temperatures.tolist() == pytest.approx([1.1, 1.1], abs=1e-12)
    assert balance_entropies(torch.tensor([1.0, 9.95]), torch.tensor([2.0, 1.0]), 0.1).tolist() == [1.0, 10.0]


def test_absld_temperatures_over_two_epochs() -> None:
    tau = torch.ones(3, 2, dtype=torch.float64)
    # Gaps of epoch 1: (-1, 0, 1) and (0.5, -0.25, -0.25); the third class errs most under attack, the first on clean pixels.
    tau = class_temperatures(tau, torch.tensor([[1.0, 1.0], [2.0, 0.25], [3.0, 0.25]], dtype=torch.float64), 0.1)
    assert tau[:, 0].tolist() == pytest.approx([1.1, 1.0, 0.9], abs=1e-12)
    assert tau[:, 1].tolist() == pytest.approx([0.9, 1.05, 1.05], abs=1e-12)
    # Epoch 2: gaps (-2, 1, 1), and a clean error that is the same for all.
    tau = class_temperatures(tau, torch.tensor([[0.0, 0.7], [3.0, 0.7], [3.0, 0.7]], dtype=torch.float64), 0.1)
    assert tau[:, 0].tolist() == pytest.approx([1.2, 0.95, 0.85], abs=1e-12)
    assert tau[:, 1].tolist() == pytest.approx([0.9, 1.05, 1.05], abs=1e-12)
    # A class that did not occur keeps its temperature, and the others are compared among themselves.
    missing = class_temperatures(tau, torch.tensor([[1.0, 1.0], [3.0, 1.0], [math.nan, math.nan]], dtype=torch.float64), 0.1)
    assert missing[:, 0].tolist() == pytest.approx([1.3, 0.85, 0.85], abs=1e-12)
    ends = class_temperatures(torch.tensor([[0.5], [5.0]]), torch.tensor([[2.0], [1.0]]), 1.0)
    assert ends.flatten().tolist() == [0.5, 5.0]


# Methods ----------------------------------------------------------------------------------------------------------------


def batch(method: Method, n: int = 12, double: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return (x.double() if double else x), y, torch.arange(n)


def test_rslad_in_float64() -> None:
    method = RSLAD(net(0), net(1), PGD(**ATTACK), alpha=0.7, optimizer=sgd).double()
    example = method.craft(batch(method))
    method.eval()
    p = method.teacher(example.x).softmax(1)
    adv, clean = (method(x).log_softmax(1) for x in (example.x_adv, example.x))
    hand = [(p * (p.log() - out)).sum(1).mean() for out in (adv, clean)]
    assert method.loss(example).item() == pytest.approx((0.7 * hand[0] + 0.3 * hand[1]).item(), abs=1e-12)
    method.kl_reduction = "mean"
    assert method.loss(example).item() == pytest.approx((0.7 * hand[0] + 0.3 * hand[1]).item() / 10, abs=1e-12)


def test_rslad_attacks_the_soft_label() -> None:
    method = RSLAD(net(0), net(1), PGD(0.1, steps=10, random_start="normal"), optimizer=sgd).double()
    example = method.craft(batch(method))
    method.eval()
    with torch.no_grad():
        target = method.teacher(example.x)
        reached, before = (distillation(method(x), target) for x in (example.x_adv, example.x))
    assert (reached > before).all()


def test_igdm_by_hand() -> None:
    method = RSLAD(net(0), net(1), PGD(**ATTACK), igdm=IGDM(4e6), optimizer=sgd).double()
    example = method.craft(batch(method))
    method.eval()
    with_term = _at_epoch(method, example, 3, 12)
    method.igdm = None
    x, adv = example.x, example.x_adv
    away = 2 * x - adv
    p = (method.teacher(adv) - method.teacher(away)).softmax(1)
    q = (method(adv) - method(away)).log_softmax(1)
    term = (p * (p.log() - q)).sum(1).mean().item()
    assert with_term - method.loss(example).item() == pytest.approx(4e6 * 3 / 12 * term, rel=1e-8)


def _at_epoch(method: Method, example: Any, epoch: int, epochs: int) -> float:
    trainer = Trainer(max_epochs=epochs, **QUIET)
    trainer.fit_loop.epoch_progress.current.completed = epoch
    method.trainer = trainer
    return method.loss(example).item()


class Watched(MTARD):
    """Keeps the losses and the weights of each step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.seen: list[tuple[list[float], list[float]]] = []

    def after_step(self, example: Any) -> None:
        super().after_step(example)
        self.seen.append((example.losses.mean(0).tolist(), self.balance.tolist()))


def test_mtard_follows_its_losses_over_a_run() -> None:
    method = Watched(net(0), net(1), net(2), PGD(**ATTACK), balance_rate=0.1, optimizer=sgd)
    fit(method)
    first, weights = method.seen[0][0], 0.5
    assert method.first_losses.tolist() == pytest.approx(first, rel=1e-6)
    for losses, balance in method.seen:
        r = [now / begin for now, begin in zip(losses, first, strict=True)]
        weights -= 0.1 * (weights - r[0] / sum(r))
        assert balance == pytest.approx([weights, 1 - weights], rel=1e-5)
    assert method.seen[-1][1][0] != pytest.approx(0.5, abs=1e-4)


def test_mtard_loss_in_float64() -> None:
    method = MTARD(net(0), net(1), net(2), PGD(**ATTACK), balance_rate=0.0, optimizer=sgd).double()
    method.balance.copy_(torch.tensor([0.3, 0.7]))
    example = method.craft(batch(method))
    method.eval()
    method.lr_factor = lambda: 1.0  # type: ignore[method-assign]
    parts = []
    for teacher, x in ((method.teacher, example.x_adv), (method.clean_teacher, example.x)):
        p = teacher(x).softmax(1)
        parts.append((p * (p.log() - method(x).log_softmax(1))).sum(1).mean())
    assert method.loss(example).item() == pytest.approx((0.3 * parts[0] + 0.7 * parts[1]).item(), abs=1e-7)


def test_a_second_look_at_the_loss_sees_the_weights_of_the_step() -> None:
    method = MTARD(net(0), net(1), net(2), PGD(**ATTACK), balance_rate=1.0, optimizer=sgd)
    method.lr_factor = lambda: 1.0  # type: ignore[method-assign]
    example = method.craft(batch(method, double=False))
    method.first_losses.fill_(1.0), method.begun.fill_(True)
    method.loss(example)
    seen = example.losses.clone()
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.mul_(1.5)
    method.loss(example)
    assert torch.equal(example.losses, seen)


def test_rates_fall_with_the_learning_rate() -> None:
    method = BMTARD(
        net(0), net(1), net(2), PGD(**ATTACK), temperature_rate=0.1, optimizer=sgd, schedule=MultiStep([1], gamma=0.1)
    )
    fit(method, max_epochs=2, limit_train_batches=1)
    moved = sorted((method.temperatures - 1).tolist())
    # Untrained teachers: one of them is softened by 0.1 and then by 0.01, or brought back, and the other stays at its floor.
    assert moved[0] == pytest.approx(0, abs=1e-6) and moved[1] in (pytest.approx(0.11, abs=1e-6), pytest.approx(0.09, abs=1e-6))


def test_absld_labels_follow_the_class() -> None:
    method = ABSLD(net(0), net(1), PGD(**ATTACK), optimizer=sgd)
    method.temperatures.copy_(torch.linspace(0.5, 5, 20).view(10, 2))
    example = method.craft(batch(method, double=False))
    for_adv, for_clean = method.targets(example)
    tau = method.temperatures[example.y]
    assert torch.allclose(for_adv, example.teacher_logits / tau[:, 0].unsqueeze(1))
    assert torch.allclose(for_clean, example.teacher_logits / tau[:, 1].unsqueeze(1))
    method.official_alias = True
    for target in method.targets(example):
        assert torch.allclose(target, example.teacher_logits / tau.prod(1).unsqueeze(1))


def test_the_alias_is_that_of_the_public_code() -> None:
    """What in-place division of two names of one tensor gives, row by row."""
    logits, tau = torch.randn(6, 10), torch.rand(10, 2) + 0.5
    y = torch.randint(10, (6,))
    adv = nat = logits.clone().detach()
    for i in range(6):
        adv[i] /= tau[y[i], 0]
        nat[i] /= tau[y[i], 1]
    method = ABSLD(net(0), net(1), PGD(**ATTACK), official_alias=True)
    method.temperatures.copy_(tau)
    example = method.clean((torch.rand(6, 1, 8, 8), y, torch.arange(6)))
    example.teacher_logits = logits
    for target in method.targets(example):
        assert torch.allclose(target, adv, rtol=1e-5)


def test_absld_gathers_the_errors_of_its_own_steps() -> None:
    method = ABSLD(net(0), net(1), PGD(**ATTACK), temperature_rate=0.1, optimizer=sgd)
    kept: list[tuple[Tensor, Tensor]] = []
    after = method.after_step

    class Keeps(ABSLD):
        def after_step(self, example: Any) -> None:
            kept.append((example.errors, example.y))
            after(example)

    method.__class__ = Keeps
    fit(method)
    errors, y = (torch.cat(part) for part in zip(*kept, strict=True))
    means = torch.stack([errors[y == c].mean(0) for c in range(10)])
    gap = means - means.mean(0)
    expected = (1 - 0.1 * gap / gap.abs().amax(0)).clamp(0.5, 5)
    assert torch.allclose(method.temperatures, expected, atol=1e-5)
    assert not method.class_errors.sums.any() and not method.class_errors.counts.any()


@pytest.mark.parametrize("kind", ["rslad", "mtard", "absld"])
def test_teachers_are_asked_as_often_as_the_docstring_says(kind: str) -> None:
    counts = {"teacher": 0, "clean_teacher": 0}

    def counted(name: str, seed: int) -> nn.Module:
        teacher = net(seed)
        teacher.register_forward_hook(lambda *_: counts.__setitem__(name, counts[name] + 1))
        return teacher

    one, two = counted("teacher", 1), counted("clean_teacher", 2)
    build = {
        "rslad": lambda: RSLAD(net(0), one, PGD(**ATTACK), optimizer=sgd),
        "mtard": lambda: MTARD(net(0), one, two, PGD(**ATTACK), optimizer=sgd),
        "absld": lambda: ABSLD(net(0), one, PGD(**ATTACK), optimizer=sgd),
    }[kind]
    method = build()
    for _ in range(3):
        method.craft(batch(method, double=False))
    assert counts == {"teacher": 3, "clean_teacher": 3 if kind == "mtard" else 0}


# Teachers ---------------------------------------------------------------------------------------------------------------


def test_a_teacher_is_in_no_optimizer_average_or_checkpoint(tmp_path: Path) -> None:
    method = MTARD(net(0), net(1), net(2), PGD(**ATTACK), optimizer=sgd)
    before = {name: t.clone() for name, t in method.named_parameters() if "teacher" in name}
    average = EMA(0.5)
    trainer = fit(method, callbacks=[average])
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in method.net.parameters()}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"net", "balance", "first_losses", "begun"}
    assert all(name.startswith("net.") for name in average.weights)
    assert not any(module.training for teacher in method.teachers.values() for module in teacher.modules())
    after = dict(method.named_parameters())
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision: str) -> None:
    x = torch.rand(4, 1, 8, 8)
    full, half = Teacher(net(1)), Teacher(net(1), precision)
    assert next(half.parameters()).dtype == getattr(torch, precision)
    logits = half(x)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, full(x), atol=0.02) and not torch.equal(logits, full(x))
    fit(RSLAD(net(0), half, PGD(**ATTACK), optimizer=sgd))


def test_cached_logits_are_those_of_the_images() -> None:
    data = digits()
    method = RSLAD(net(0), Teacher(net(1), cache=True), PGD(**ATTACK), optimizer=sgd)
    asked: list[int] = []
    fit(method, data)
    method.teacher.net.register_forward_hook(lambda _, given, out: asked.append(len(given[0])))
    index = data.split[0][:7]
    x, y = data.train_set.read(index, None)
    example = method.craft((x, y, index))
    assert not asked
    assert torch.allclose(example.teacher_logits, method.teacher(x), atol=1e-5)


def test_who_is_never_asked_about_clean_pixels_fills_no_cache() -> None:
    asked: list[int] = []
    method = MTARD(net(0), Teacher(net(1), cache=True), net(2), PGD(**ATTACK), optimizer=sgd)
    method.teacher.net.register_forward_hook(lambda _, given, out: asked.append(len(given[0])))
    fit(method)
    assert sum(asked[-3:]) == 3 * 64 and sum(asked) < 3 * 64 + 14 * 144  # the look before: 13 passes of 144 images


def test_a_teacher_in_float16_is_no_part_of_an_attack() -> None:
    with pytest.raises(ValueError, match=r"teacher.precision='float16' .* bfloat16 or float32"):
        AdaAD(net(0), Teacher(net(1), "float16"), PGD(**ATTACK))


def test_a_run_with_a_cache_equals_one_without() -> None:
    weights = []
    for cache in (False, True):
        method = RSLAD(net(0), Teacher(net(1), cache=cache), PGD(**ATTACK), optimizer=sgd)
        fit(method)
        weights.append(torch.cat([p.flatten() for p in method.net.parameters()]))
    # The teacher saw other batches, which round differently, and an attack has corners.
    assert torch.allclose(*weights, atol=1e-3)


def test_a_cache_under_augmentation_is_refused() -> None:
    method = RSLAD(net(0), Teacher(net(1), cache=True), PGD(**ATTACK), optimizer=sgd)
    with pytest.raises(ValueError, match=r"teacher.cache=True .* augment"):
        fit(method, digits(augment=True))


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher returns logits of shape \(2, 7\).* 10 classes"):
        fit(RSLAD(net(0), net(1, classes=7), PGD(**ATTACK), optimizer=sgd))


def test_one_network_twice_is_refused() -> None:
    one = net(1)
    with pytest.raises(ValueError, match="two teachers are one network"):
        fit(MTARD(net(0), one, one, PGD(**ATTACK), optimizer=sgd))
    with pytest.raises(ValueError, match="a teacher is the student itself"):
        fit(RSLAD(one, one, PGD(**ATTACK), optimizer=sgd))


class Plane(nn.Module):
    """A linear classifier of digits, trained here in a moment, which expects pixels as ``scale`` and ``shift`` make them."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        from sklearn.linear_model import LogisticRegression

        data = digits()
        x, y = data.train_set.read(data.split[0], None)
        model = LogisticRegression(max_iter=500).fit(((x - shift) / scale).flatten(1).numpy(), y.numpy())
        self.linear = nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(model.coef_))
            self.linear.bias.copy_(torch.from_numpy(model.intercept_))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def test_a_teacher_that_expects_normalised_pixels_is_refused() -> None:
    mean, std = 0.3053, 0.3761  # of the digits
    teacher = Plane(std, mean)
    with pytest.raises(ValueError, match=r"teacher is right on .* if they are normalised .* nets.Normalize"):
        fit(RSLAD(net(0), teacher, PGD(**ATTACK), optimizer=sgd))
    fit(RSLAD(net(0), nn.Sequential(Normalize([mean], [std]), teacher), PGD(**ATTACK), optimizer=sgd))


def test_a_teacher_that_lacks_robustness_is_measured_and_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"teacher is right on \d+\.\d% of 144 validation images under PGD-10 \(linf, eps 0.3\)"
    ):
        fit(RSLAD(net(0), Plane(), PGD(0.3, steps=1), optimizer=sgd))


def test_a_clean_teacher_worse_than_the_robust_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"clean_teacher is right on .* and the robust teacher on 9"):
        fit(MTARD(net(0), Plane(), net(1), PGD(0.1, steps=1), optimizer=sgd))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RSLAD(net(), net(), alpha=2), "alpha=2"),
        (lambda: RSLAD(net(), net(), kl_reduction="sum"), "kl_reduction='sum'"),
        (lambda: MTARD(net(), net(), net(), balance_rate=2), "balance_rate=2"),
        (lambda: MTARD(net(), net(), net(), beta=-1), "beta=-1"),
        (lambda: BMTARD(net(), net(), net(), temperature_rate=-1), "temperature_rate=-1"),
        (lambda: BMTARD(net(), net(), net(), max_temperature=0.5), "max_temperature=0.5"),
        (lambda: ABSLD(net(), net(), min_temperature=2), "min_temperature=2"),
        (lambda: IGDM(-1), "alpha=-1"),
        (lambda: Teacher(net(), "float8"), "precision='float8'"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
