"""EMA and SWA: their numbers, that raw weights do not notice, that they resume, and what is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import robust_pl as package
from robust_pl.callbacks import EMA, FGSM, FGUAP, PGD, SWA, RobustEvaluation, WeightAverage
from robust_pl.data import CutMix, DigitsDataModule
from robust_pl.methods import TRADES, Example, Method, StandardTraining
from robust_pl.nets import Frozen, SmallCNN, load_weights

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def loader(n: int = 48, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


class Recorder(Callback):
    """The module's state after each batch, the initial one first."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
        average = next((c for c in trainer.callbacks if isinstance(c, WeightAverage)), None)
        self.averages.append({} if average is None else {name: tensor.clone() for name, tensor in average.weights.items()})


def standard() -> Method:
    return StandardTraining(SmallCNN(width=4), optimizer=sgd).double()


def fit(build: Callable[[], Method], *callbacks: Callback, data: Any = None, **more: Any) -> tuple[Recorder, Method]:
    seed_everything(0, verbose=False)
    method = build()
    recorder = Recorder()
    settings = {"max_epochs": 1, "limit_val_batches": 0, "precision": "64-true", **more}
    Trainer(callbacks=[*callbacks, recorder], **{**QUIET, **settings}).fit(method, data or loader())
    return recorder, method


def decay_of(n: int, limit: float) -> float:
    return min(limit, (1 + n) / (10 + n))


# EMA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "first"), [(0, 0), (2, 2), (0.5, 3)])
def test_ema_is_that_of_a_loop_by_hand(warmup: float, first: int) -> None:
    ema = EMA(decay=0.25, warmup=warmup)
    recorder, _ = fit(standard, ema)
    assert recorder.averages[:first] == [{}] * first
    for name in ema.weights:
        average = recorder.states[first][name]
        assert torch.equal(recorder.averages[first][name], average)
        for n, state in enumerate(recorder.states[first + 1 :]):
            d = decay_of(n, 0.25)
            average = d * average + (1 - d) * state[name]
            torch.testing.assert_close(recorder.averages[first + 1 + n][name], average, rtol=0, atol=1e-12)
    assert decay_of(0, 0.25) == 0.1 and decay_of(1, 0.25) < 0.25 == decay_of(2, 0.25)


def test_buffers_are_averaged_or_left_to_the_raw_weights() -> None:
    statistics = {"net.layers.1.running_mean", "net.layers.1.running_var"}
    for buffers in ("average", "copy"):
        ema = EMA(0.9, buffers=buffers)
        recorder, method = fit(standard, ema)
        assert statistics <= ema.weights.keys() if buffers == "average" else not statistics & ema.weights.keys()
        assert not any(name.endswith("num_batches_tracked") for name in ema.weights)
        with ema.applied(method):
            for name in statistics:
                live, seen = recorder.states[-1][name], method.state_dict()[name]
                assert torch.equal(live, seen) == (buffers == "copy")


def test_only_real_steps_count() -> None:
    recorder, _ = fit(standard, EMA(0.9), accumulate_grad_batches=3)
    changed = [
        any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(recorder.averages, recorder.averages[1:], strict=False)
    ]
    assert changed == [False, False, True, False, False, True]


class Careful(StandardTraining):
    """Accepts every other step, and says so on the device."""

    def averaging_weight(self) -> Tensor:
        return (torch.tensor(self.global_step) % 2).double()


def test_a_method_may_veto_and_the_accepted_updates_drive_the_decay() -> None:
    recorder, _ = fit(lambda: Careful(SmallCNN(width=4), optimizer=sgd).double(), EMA(0.999))
    name = "net.linear.weight"
    average, accepted = recorder.states[0][name], 0
    for step in range(1, 7):
        if step % 2:
            d = decay_of(accepted, 0.999)
            average, accepted = d * average + (1 - d) * recorder.states[step][name], accepted + 1
        torch.testing.assert_close(recorder.averages[step][name], average, rtol=0, atol=1e-7)
    assert accepted == 3


class Replays(StandardTraining):
    """Three steps a batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, optimizer=sgd)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()


def test_several_steps_in_a_batch_move_it_once_by_the_share_of_all() -> None:
    recorder, _ = fit(lambda: Replays(SmallCNN(width=4)).double(), EMA(0.999))
    name = "net.linear.weight"
    d = math.prod(decay_of(n, 0.999) for n in (3, 4, 5))
    expected = d * recorder.averages[1][name] + (1 - d) * recorder.states[2][name]
    torch.testing.assert_close(recorder.averages[2][name], expected, rtol=0, atol=1e-12)


def test_half_precision_is_averaged_in_float32() -> None:
    ema = EMA(0.999)
    _, method = fit(lambda: StandardTraining(SmallCNN(width=4), optimizer=sgd), ema, precision="bf16-true", max_epochs=2)
    assert method.net.linear.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in ema.weights.values()} == {torch.float32}
    before = method.net.linear.weight.clone()
    with ema.applied(method):
        assert torch.equal(method.net.linear.weight, ema.weights["net.linear.weight"].bfloat16())
    assert torch.equal(method.net.linear.weight, before)


# SWA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "every", "epochs"), [(1, 1, [1, 2, 3, 4]), (0.5, 2, [2, 4]), (4, 1, [4]), (9, 1, [])])
def test_swa_is_the_mean_of_the_weights_at_the_ends_of_epochs(start: float, every: int, epochs: list[int]) -> None:
    swa = SWA(start, every)
    recorder, _ = fit(standard, swa, max_epochs=5)
    assert swa.begun == bool(epochs)
    for name in swa.weights:
        if "running" not in name:
            mean = torch.stack([recorder.states[6 * (epoch + 1)][name] for epoch in epochs]).mean(0)
            torch.testing.assert_close(swa.weights[name], mean, rtol=0, atol=1e-12)


def test_an_average_that_never_began_says_so() -> None:
    with pytest.warns(UserWarning, match="ended before the average 'swa' began"):
        fit(standard, SWA(start=3), max_epochs=4, max_steps=2)


class Pair(Method):
    """Forwards two images for each it is given, crafted at random, and counts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, optimizer=sgd)
        self.register_buffer("seen", torch.zeros(()))
        self.crafted = 0

    def craft(self, batch: tuple[Tensor, ...]) -> Example:
        self.crafted += 1
        self.seen += 1
        self.log("train/seen", self.seen)
        example = self.clean(batch)
        example.x_adv = (example.x + 0.1 * torch.rand_like(example.x)).clamp(0, 1)
        return example

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y) + F.cross_entropy(self(example.x_adv), example.y)


@pytest.mark.parametrize("buffers", ["method", "clean"])
def test_statistics_are_those_of_a_pass_by_hand(buffers: Any, tmp_path: Path) -> None:
    swa = SWA(start=1, buffers=buffers, batches=4)
    method = Pair(SmallCNN(width=4)).double()
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=3, limit_val_batches=0, precision="64-true", callbacks=[swa], **QUIET)
    trainer.fit(method, loader())
    crafted, state, stream = method.crafted, {k: v.clone() for k, v in method.state_dict().items()}, torch.get_rng_state()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert method.crafted == crafted == 18 and torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())

    net = SmallCNN(width=4).double().train()
    load_weights(net, f"{tmp_path}/x.ckpt#swa")
    means: list[Tensor] = []
    net.layers[0].register_forward_hook(lambda _, __, out: means.append(out))
    torch.set_rng_state(stream)
    with torch.no_grad():
        for x, _ in list(loader())[:4]:
            net(x.double())
            if buffers == "method":
                net((x.double() + 0.1 * torch.rand_like(x.double())).clamp(0, 1))
    assert len(means) == (8 if buffers == "method" else 4)
    found = swa.weights
    mean = torch.stack([out.mean((0, 2, 3)) for out in means]).mean(0)
    var = torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in means]).mean(0)
    torch.testing.assert_close(found["net.layers.1.running_mean"], mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["net.layers.1.running_var"], var, rtol=0, atol=1e-12)


def test_statistics_are_those_of_augmented_batches_though_validation_asks_for_them() -> None:
    seen = []

    class Seen(StandardTraining):
        def craft(self, batch: tuple[Tensor, ...]) -> Example:
            seen.append((self.trainer.training, batch[0].clone(), batch[1].clone()))
            return super().craft(batch)

    data = DigitsDataModule(batch_size=16, augment=[CutMix()])
    limits = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    Trainer(callbacks=[SWA(start=0, batches=1), FGSM(0.1)], **QUIET, **limits).fit(Seen(SmallCNN(width=4), optimizer=sgd), data)
    (in_step, x, y), (in_average, x_again, y_again) = seen
    assert in_step and not in_average
    assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_statistics_are_computed_once_for_each_new_average(monkeypatch: pytest.MonkeyPatch) -> None:
    from robust_pl.callbacks.weights import averaging

    calls = []
    real = averaging.recompute
    monkeypatch.setattr(averaging, "recompute", lambda *a, **k: calls.append(1) or real(*a, **k))
    swa = SWA(start=1, every=2, batches=1)
    trainer = Trainer(max_epochs=4, callbacks=[swa, FGSM(0.1)], **QUIET)
    trainer.fit(StandardTraining(SmallCNN(width=4), optimizer=sgd), loader(), loader(seed=1))
    assert len(calls) == 2


# What may not change --------------------------------------------------------------------------------------------------


def averages() -> list[Callback]:
    return [EMA(0.9, buffers="method", batches=2), SWA(start=1, batches=2), EMA(0.99, warmup=0.3, name="slow")]


def trades() -> Method:
    net = nn.Sequential(nn.Dropout(0.1), SmallCNN(width=4))
    return TRADES(net, PGD(eps=0.1, steps=2, random_start="normal"), optimizer=sgd)


def test_raw_weights_are_equal_with_and_without_averages() -> None:
    """Validation in between evaluates the averages, too, which must not touch any random stream or statistic."""
    found = []
    for callbacks in ([], averages()):
        data = DigitsDataModule(batch_size=256, eval_batch_size=72)
        recorder, method = fit(trades, FGSM(0.1), *callbacks, data=data, max_epochs=3, limit_val_batches=1, precision="32-true")
        found.append(recorder.states[-1] | {"forwards": torch.tensor(method.attack.forwards)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_frozen_networks_and_parameters_are_not_copied() -> None:
    class Taught(StandardTraining):
        def __init__(self) -> None:
            super().__init__(SmallCNN(width=4), optimizer=sgd)
            self.teacher = Frozen(SmallCNN(width=4))
            self.net.layers[0].requires_grad_(False)

    ema = EMA()
    fit(lambda: Taught().double(), ema)
    assert "net.linear.weight" in ema.weights and "net.layers.0.weight" not in ema.weights
    assert not any("teacher" in name for name in ema.weights)


def test_tied_weights_are_averaged_once_and_saved_under_both_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 10, bias=False), nn.Linear(64, 10, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x.flatten(1)) + self.second(x.flatten(1))

    ema = EMA(0.5)
    recorder, _ = fit(lambda: StandardTraining(Tied(), optimizer=sgd).double(), ema)
    assert ema.weights["net.first.weight"] is ema.weights["net.second.weight"]
    d, (before, after) = decay_of(5, 0.5), (average["net.first.weight"] for average in recorder.averages[-2:])
    torch.testing.assert_close(after, d * before + (1 - d) * recorder.states[-1]["net.first.weight"], rtol=0, atol=1e-12)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stop", [2, 8, 10])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    """In the middle and at the end of an epoch; a run that saves on its way ends as one that does not."""

    def run(name: str, *more: Callback, resume: str | None = None) -> dict[str, Any]:
        seed_everything(0, verbose=False)
        trainer = Trainer(max_epochs=3, limit_val_batches=1, callbacks=[FGSM(0.1), *averages(), *more], **QUIET)
        data = DigitsDataModule(batch_size=256, eval_batch_size=72)
        trainer.fit(trades(), data, ckpt_path=resume and str(tmp_path / resume), weights_only=True if resume else None)
        trainer.save_checkpoint(tmp_path / name)
        return torch.load(tmp_path / name, weights_only=True)

    whole = run("whole.ckpt")
    assert whole["global_step"] == 15
    saved = run("saved.ckpt", SaveAt(stop, tmp_path / "part.ckpt"))
    assert_same(whole, saved)
    assert_same(whole, run("resumed.ckpt", resume="part.ckpt"))


def assert_same(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    kept = whole["robust_pl_averages"]
    assert list(kept) == ["ema", "swa", "slow"]
    for key, average in kept.items():
        again = resumed["robust_pl_averages"][key]
        assert average["progress"] == again["progress"]
        for name, tensor in average["weights"].items():
            assert torch.equal(tensor, again["weights"][name]), (key, name)


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluated_beside_the_raw_weights_as_a_network_of_its_own() -> None:
    seed_everything(0, verbose=False)
    attacks = {"fgsm": FGSM(0.1), "pgd": PGD(0.1, steps=3)}
    ema, swa = EMA(0.95), SWA(start=3)
    trainer = Trainer(max_epochs=3, callbacks=[*attacks.values(), ema, swa], **QUIET)
    method = StandardTraining(SmallCNN(width=4), optimizer=sgd)
    data = DigitsDataModule(batch_size=64)
    trainer.fit(method, data)
    logged = dict(trainer.callback_metrics)
    assert not swa.begun and not any("swa" in key for key in logged)
    assert {"val/acc_worst", "val_ema/acc_worst", "val_ema/worst_class_fgsm", "val_ema/loss"} <= logged.keys()
    trainer.test(method, data, verbose=False)
    copy = StandardTraining(SmallCNN(width=4))
    copy.load_state_dict({**method.state_dict(), **ema.weights})
    for prefix, net in (("test", method), ("test_ema", copy)):
        expected = package.evaluate(net, data, attacks).metrics
        for key in ("acc_clean", "acc_fgsm", "acc_pgd", "acc_worst", "forwards_pgd"):
            assert trainer.callback_metrics[f"{prefix}/{key}"] == pytest.approx(expected[key], abs=1e-6), (prefix, key)
    assert trainer.callback_metrics["test/loss"] != trainer.callback_metrics["test_ema/loss"]
    assert not any(key.startswith("test_ema") for key in _tested(method, data, RobustEvaluation(averages=False), EMA()))


def _tested(method: Method, data: Any, *callbacks: Callback) -> dict[str, Any]:
    trainer = Trainer(callbacks=list(callbacks), **QUIET)
    trainer.test(method, data, verbose=False)
    return dict(trainer.callback_metrics)


def test_an_attack_that_learns_learns_from_each_set_of_weights() -> None:
    seed_everything(0, verbose=False)
    uap, ema = FGUAP(0.3, epochs=1), EMA(0.95)
    trainer = Trainer(max_epochs=2, limit_val_batches=0, callbacks=[uap, ema], **QUIET)
    method, data = StandardTraining(SmallCNN(width=4), optimizer=sgd), DigitsDataModule(batch_size=64)
    trainer.fit(method, data)
    trainer.test(method, data, verbose=False)
    tracks = RobustEvaluation.ensure(trainer).tracks
    learned = [next(iter(track.attacks.values())).delta for track in tracks]
    assert len(learned) == 2 and not torch.equal(*learned) and learned[0] is uap.delta


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two averages are named 'ema'"):
        fit(standard, EMA(), EMA(0.9))
    fit(standard, EMA(), EMA(0.9, name="fast"), max_steps=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EMA(1.0), r"decay=1\.0"),
        (lambda: EMA(warmup=1.5), r"warmup=1\.5"),
        (lambda: EMA(buffers="reset"), "buffers='reset' is unknown: choose one of copy, average"),
        (lambda: EMA(name="raw"), "name='raw'"),
        (lambda: EMA(name="a/b"), "name='a/b'"),
        (lambda: SWA(start=-1), "start=-1"),
        (lambda: SWA(every=0), "every=0"),
        (lambda: SWA(batches=0), "batches=0"),
        (lambda: fit(standard, EMA(warmup=0.1), max_epochs=-1, max_steps=-1), "share of all steps"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
