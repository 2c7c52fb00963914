"""What the protocol of the FastAT benchmark (Pan and Yao 2026, arXiv 2604.22853) asks of schedules, averages and Free-AT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from robust_pl.callbacks import EMA, FGSM
from robust_pl.methods import AFA, FreeAT, OneCycle, StandardTraining
from robust_pl.nets import AdaptiveDualNet, SmallCNN

from .test_averaging import Recorder
from .test_free_at import Linear, Watched, batches
from .test_methods import QUIET, loader


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


# OneCycle -------------------------------------------------------------------------------------------------------------


class Rates(Callback):
    """Learning rate and momentum of the first step of each epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            group = trainer.optimizers[0].param_groups[0]
            self.seen.append((group["lr"], group["momentum"]))


def fit(schedule: OneCycle, epochs: int, method: type = StandardTraining, **settings: Any) -> Rates:
    rates = Rates()
    one = method(SmallCNN(width=1), optimizer=sgd, schedule=schedule)
    Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[rates], **QUIET, **settings).fit(one, loader(n=16))
    return rates


def test_the_rates_and_momenta_of_the_protocol() -> None:
    seen = fit(OneCycle(0.1, interval="epoch", cycle_momentum=True), 100).seen
    published = {0: 0.004, 10: 0.0295, 20: 0.0789, 29: 0.1, 50: 0.0794, 60: 0.0589, 70: 0.0367, 80: 0.0171, 90: 0.0040}
    assert {epoch: round(seen[epoch][0], 4) for epoch in published} == published
    assert seen[99][0] == pytest.approx(4e-7) and len(seen) == 100
    momenta = [momentum for _, momentum in seen]
    assert (momenta[0], momenta[29], momenta[99]) == pytest.approx((0.95, 0.85, 0.95))
    assert momenta[:30] == sorted(momenta[:30], reverse=True) and momenta[29:] == sorted(momenta[29:])


def test_a_cycle_that_is_longer_than_the_run_is_still_rising_at_its_end() -> None:
    """The benchmark's Free-AT: 50 epochs of a cycle of 200, whose last learning rate is 0.0934."""
    seen = fit(OneCycle(0.1, interval="epoch", total_steps=200), 50, FreeAT).seen
    assert round(seen[49][0], 4) == 0.0934 and seen == sorted(seen) and {momentum for _, momentum in seen} == {0.9}
    by_step = fit(OneCycle(0.1, total_steps=1000), 2)  # two steps an epoch
    scheduler = OneCycle(0.1).build(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1000)
    for _ in range(2):
        scheduler.optimizer.step()
        scheduler.step()
    assert by_step.seen[1][0] == pytest.approx(scheduler.get_last_lr()[0])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: OneCycle(total_steps=0), "total_steps=0 is the length"),
        (lambda: fit(OneCycle(total_steps=3), 2), "total_steps=3 of OneCycle ends before the run, which has 4 steps"),
        (lambda: fit(OneCycle(interval="epoch", total_steps=1), 2), "total_steps=1 of OneCycle .* 2 epochs"),
        (
            lambda: OneCycle(cycle_momentum=True).build(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), 5),
            "cycle_momentum=True moves a momentum, and Adagrad has none",
        ),
        (
            lambda: AFA(AdaptiveDualNet(SmallCNN(width=1), 1), optimizer=sgd, schedule=OneCycle(cycle_momentum=True)),
            "set cycle_momentum to False",
        ),
    ],
)
def test_cycles_that_cannot_be(schedule: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made = schedule()
        if isinstance(made, AFA):
            Trainer(max_epochs=4, limit_val_batches=0, **QUIET).fit(made, loader())


def test_a_rise_of_no_steps_begins_at_the_peak() -> None:
    scheduler = OneCycle(0.5, pct_start=0.25).build(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 4)
    assert scheduler.get_last_lr() == [0.5]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_run_of_another_length_is_refused_only_where_its_cycle_is_another(tmp_path: Path, interval: Any) -> None:
    def run(epochs: int, total_steps: int | None, checkpoint: Path | None = None) -> Trainer:
        schedule = OneCycle(0.1, interval=interval, cycle_momentum=True, total_steps=total_steps)
        method = StandardTraining(SmallCNN(width=1), optimizer=sgd, schedule=schedule)
        trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET)
        trainer.fit(method, loader(n=16), ckpt_path=checkpoint, weights_only=True)
        return trainer

    steps = 1 if interval == "epoch" else 2  # of each epoch
    run(1, 6).save_checkpoint(tmp_path / "given.ckpt")
    run(2, None).save_checkpoint(tmp_path / "laid.ckpt")
    whole, resumed = run(3, 6), run(3, 6, tmp_path / "given.ckpt")
    assert resumed.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]
    assert resumed.optimizers[0].param_groups[0]["momentum"] == whole.optimizers[0].param_groups[0]["momentum"]
    for checkpoint, total_steps, was, now in (
        ("given", 7, 6, 7),
        ("given", None, 6, 3 * steps),
        ("laid", None, 2 * steps, 3 * steps),
    ):
        if was != now:
            with pytest.raises(ValueError, match=f"laid over {was} {interval}s, that of this run over {now}: keep"):
                run(3, total_steps, tmp_path / f"{checkpoint}.ckpt")


# EMA ------------------------------------------------------------------------------------------------------------------


def averaged(method: type[StandardTraining], **settings: Any) -> Recorder:
    torch.manual_seed(0)
    recorder = Recorder()
    module = method(SmallCNN(width=4), optimizer=sgd).double()
    callbacks = [EMA(decay=0.9995, warmup=1, ramp=False), recorder]
    Trainer(max_epochs=2, limit_val_batches=0, precision="64-true", callbacks=callbacks, **QUIET, **settings).fit(
        module, loader()
    )
    return recorder


def test_an_average_without_a_ramp_is_that_of_the_protocol() -> None:
    recorder = averaged(StandardTraining)
    assert recorder.averages[0] == {} and "net.layers.1.running_var" in recorder.averages[1]
    for name in recorder.averages[1]:
        average = recorder.states[1][name]
        assert torch.equal(recorder.averages[1][name], average)
        for step in range(2, 7):
            average = 0.9995 * average + 0.0005 * recorder.states[step][name]
            torch.testing.assert_close(recorder.averages[step][name], average, rtol=0, atol=1e-14)


class Vetoes(StandardTraining):
    """Takes no step but every other one."""

    def averaging_weight(self) -> Tensor:
        return (torch.tensor(self.global_step) % 2).double()


def test_without_a_ramp_accepted_steps_take_the_decay_as_it_is() -> None:
    recorder, name = averaged(Vetoes), "net.linear.weight"
    average = recorder.states[1][name]
    for step in range(2, 7):
        average = 0.9995 * average + 0.0005 * recorder.states[step][name] if step % 2 else average
        torch.testing.assert_close(recorder.averages[step][name], average, rtol=0, atol=1e-9)


def test_without_a_ramp_replays_move_it_by_the_share_of_all() -> None:
    torch.manual_seed(0)
    recorder = Recorder()
    method = FreeAT(SmallCNN(width=4), replays=4, optimizer=sgd).double()
    ema = EMA(decay=0.9, warmup=1, ramp=False)
    Trainer(max_epochs=1, limit_val_batches=0, precision="64-true", callbacks=[ema, recorder], **QUIET).fit(method, loader())
    name = "net.linear.weight"
    average = recorder.states[1][name]  # of the first batch, after its four steps
    for batch in (2, 3):
        average = 0.9**4 * average + (1 - 0.9**4) * recorder.states[batch][name]
        torch.testing.assert_close(recorder.averages[batch][name], average, rtol=0, atol=1e-12)


# Free-AT --------------------------------------------------------------------------------------------------------------


def test_replays_that_begin_at_the_clean_image_by_hand() -> None:
    """Two batches, the second smaller, of three replays each on a linear network with smoothed labels, in float64."""
    torch.manual_seed(0)
    x, y = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    x[0, 0, 0, 0], x[3, 0, 1, 1] = 0.02, 0.99
    soft = 0.6 * F.one_hot(y, 3).double() + 0.4 / 3
    net, eps, lr = Linear().double(), 0.1, 0.5
    weight = net.layer.weight.detach().clone()

    def plain(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr)

    method = FreeAT(net, FGSM(eps=eps), replays=3, optimizer=plain, num_classes=3, carry=False).double()
    Trainer(max_epochs=1, limit_val_batches=0, precision="64-true", **QUIET).fit(method, batches(x, soft, 3))
    for part, labels in ((x[:3], soft[:3]), (x[3:], soft[3:])):
        flat, n = part.flatten(1), len(part)
        delta = torch.zeros_like(flat)
        for _ in range(3):
            seen = flat + delta
            error = ((seen @ weight.T).softmax(1) - labels) / n
            delta = (flat + (delta + eps * (error @ weight).sign()).clamp(-eps, eps)).clamp(0, 1) - flat
            weight = weight - lr * error.T @ seen
    assert torch.allclose(net.layer.weight, weight, atol=1e-12, rtol=0)
    assert method._delta is None


def test_every_batch_begins_clean_and_its_replays_go_on() -> None:
    method = Watched(SmallCNN(width=4), FGSM(eps=0.1), replays=3, optimizer=sgd, carry=False)
    Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(method, loader(n=20))
    assert len(method.examples) == 18
    for place, example in enumerate(method.examples):
        assert torch.equal(example.x_adv, example.x) == (place % 3 == 0)
        assert (example.x_adv - example.x).abs().max() <= 0.1 + 1e-6 and 0 <= example.x_adv.min() <= example.x_adv.max() <= 1


def test_a_run_without_carry_keeps_no_perturbation(tmp_path: Path) -> None:
    def run(epochs: int, carry: bool, checkpoint: Path | None = None) -> tuple[Trainer, FreeAT]:
        torch.manual_seed(0)
        method = FreeAT(SmallCNN(width=4), FGSM(0.1), replays=2, optimizer=sgd, carry=carry)
        method._checked = {True, False}
        trainer = Trainer(max_epochs=epochs, limit_val_batches=0, **QUIET)
        trainer.fit(method, loader(n=20), ckpt_path=checkpoint, weights_only=True)
        return trainer, method

    whole = run(2, False)[1]
    run(1, False)[0].save_checkpoint(tmp_path / "clean.ckpt")
    run(1, True)[0].save_checkpoint(tmp_path / "carried.ckpt")
    saved = torch.load(tmp_path / "clean.ckpt", weights_only=True)["robust_pl_free_at"]["delta"]
    assert saved == [None]
    resumed = run(2, False, tmp_path / "clean.ckpt")[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert run(1, False, tmp_path / "carried.ckpt")[1]._delta is None
    assert run(1, True, tmp_path / "carried.ckpt")[1]._delta is not None
