"""Monitors: passes and FLOPs against counts by hand, planted overfitting, rollbacks bit for bit, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import FGSM, PGD, CatastrophicOverfitting, ComputeMonitor, RobustOverfitting
from robust_pl.callbacks.monitors.compute import COST_KEY
from robust_pl.callbacks.monitors.passes import PassCounter
from robust_pl.data import DigitsDataModule
from robust_pl.functional.gradients import input_gradient
from robust_pl.methods import AFA, PGDAT, TRADES, Example, Method, StandardTraining
from robust_pl.nets import AdaptiveDualNet, SmallCNN
from robust_pl.nets.frozen import Frozen
from robust_pl.report import Table, as_markdown

from .conftest import TINY
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "limit_val_batches": 0,
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def loader(n: int = 24, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def small() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(width=4)


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, **settings: Any) -> Trainer:
    if isinstance(module, Method):
        module._checked = {True, False}  # the look at the first batch of a run
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, loader() if data is None else data)
    return trainer


class Aligned(Method):
    """Differentiates an input gradient, as GradAlign does."""

    def loss(self, example: Example) -> Tensor:
        gradient, _ = input_gradient(
            self, example.x, lambda z: F.cross_entropy(z, example.y, reduction="none"), create_graph=True
        )
        return F.cross_entropy(self(example.x_adv), example.y) + gradient.square().mean()


class Featured(Method):
    """Asks the network for features and logits, and a teacher for logits."""

    def __init__(self, net: nn.Module, teacher: nn.Module) -> None:
        super().__init__(net, optimizer=sgd)
        self.teacher = Frozen(teacher)

    def loss(self, example: Example) -> Tensor:
        h = self.net.forward_features(example.x)
        return F.mse_loss(self.net.head(h), self.teacher(example.x)) + h.square().mean()


class Replays(LightningModule):
    """Not one of our methods: optimizes by hand, twice a batch, with one backward pass over weights and pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            x = batch[0].clone().requires_grad_()
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(x), batch[1]))
            self.optimizers().step()


COUNTS = {
    # forward, input backward and weight backward passes a sample
    "StandardTraining": (lambda: StandardTraining(small(), optimizer=sgd), {"net": (1, 0, 1)}),
    "PGDAT": (lambda: PGDAT(small(), PGD(steps=10), optimizer=sgd), {"net": (11, 10, 1)}),
    "TRADES": (lambda: TRADES(small(), PGD(steps=10, random_start="normal"), optimizer=sgd), {"net": (13, 10, 2)}),
    # FGSM, the gradient, and then both losses and the gradient's own graph.
    "double backward": (lambda: Aligned(small(), FGSM(), optimizer=sgd), {"net": (3, 2, 3)}),
    "features and a teacher": (lambda: Featured(small(), small()), {"net": (1, 0, 1), "teacher": (1, 0, 0)}),
    "by hand": (Replays, {"model": (2, 0, 2)}),
}


@pytest.mark.parametrize(
    ("name", "accumulate"), [*((name, 1) for name in COUNTS), *((name, 3) for name in COUNTS if name != "by hand")]
)
def test_passes_are_those_counted_by_hand(name: str, accumulate: int) -> None:
    build, expected = COUNTS[name]
    monitor = ComputeMonitor(show=False)
    fit(build(), monitor, accumulate_grad_batches=accumulate)
    cost = monitor.cost
    assert cost["samples"] == 48
    found = {name: tuple(n / 48 for n in network["training"].values()) for name, network in cost["networks"].items()}
    assert found == expected
    assert all(not any(network["evaluation"].values()) for network in cost["networks"].values())
    assert cost["seconds"] > 0 and cost["device_hours"] == cost["seconds"] / 3600 and cost["device"] == "CPU"


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def test_flops_are_those_worked_out_by_hand() -> None:
    # Each of 2 * 6 * 6 outputs of the convolution takes 9 products, each of 3 outputs of the linear layer 72.
    conv, linear = 2 * (2 * 6 * 6) * 9, 2 * 72 * 3
    counter = PassCounter(Plain(), lambda: "training")
    counter.net(torch.rand(5, 1, 8, 8))
    assert counter.flops.forwards == conv + linear
    assert counter.flops.weight_backwards == conv + 2 * linear  # nobody needs the gradient of the pixels
    assert counter.flops.input_backwards == conv + linear
    monitor = ComputeMonitor(show=False)
    y = torch.randint(3, (16,))
    data = DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), y), 8)
    fit(PGDAT(Plain(), PGD(steps=2), optimizer=sgd, num_classes=3), monitor, data=data)
    a_step = 3 * (conv + linear) + 2 * (conv + linear) + conv + 2 * linear
    assert monitor.cost["flops"] == 32 * a_step


def test_only_what_is_trained_is_differentiated_and_partly_frozen_networks_are_counted() -> None:
    net = Plain()
    net[0].requires_grad_(False)
    monitor = ComputeMonitor(show=False)
    data = DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.randint(3, (16,))), 8)
    fit(PGDAT(net, PGD(steps=2), optimizer=sgd, num_classes=3), monitor, data=data)
    network = monitor.cost["networks"]["net"]
    assert list(network["training"].values()) == [3 * 32, 2 * 32, 32]
    assert network["flops"]["weight_backwards"] == 2 * 72 * 3


def test_a_compiled_network_is_counted_at_its_boundary() -> None:
    net = torch.compile(small(), backend="eager")
    monitor = ComputeMonitor(show=False)
    fit(PGDAT(net, PGD(steps=2), optimizer=sgd), monitor, max_epochs=1)
    assert list(monitor.cost["networks"]["net"]["training"].values()) == [72, 48, 24]
    assert monitor.cost["flops"] > 0


def test_validation_and_monitors_are_told_apart() -> None:
    monitor, data = ComputeMonitor(show=False), DigitsDataModule(batch_size=128, augment=False)
    overfitting = CatastrophicOverfitting(samples=20, steps=3)
    method = PGDAT(small(), PGD(eps=0.1, steps=2), optimizer=sgd)
    attack = PGD(eps=0.1, steps=4)
    callbacks = [overfitting, attack, monitor]
    trainer = fit(method, *callbacks, data=data, limit_val_batches=1.0, num_sanity_val_steps=0)
    steps, val = trainer.global_step, len(data.split[1])
    network = monitor.cost["networks"]["net"]
    assert list(network["training"].values()) == [3 * 128 * steps, 2 * 128 * steps, 128 * steps]
    # A clean pass, the attack and a pass to judge it; steps + 5 and steps + 1 of the other.
    assert list(network["evaluation"].values()) == [2 * (6 * val + 8 * 20), 2 * (4 * val + 4 * 20), 0]
    assert monitor.cost["evaluation_seconds"] > 0


class Dropped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.2), SmallCNN(width=4))


def trained(*callbacks: Callback, **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    method = PGDAT(Dropped(), FGSM(eps=0.2), optimizer=sgd)
    fit(method, *callbacks, data=DigitsDataModule(batch_size=256), **settings)
    return method.state_dict(), torch.get_rng_state()


def test_who_only_watches_changes_no_bit_of_the_run() -> None:
    settings = {"accumulate_grad_batches": 2}
    before, stream = trained(**settings)
    every = CatastrophicOverfitting(every_n_steps=1, samples=32, steps=2, gap=0.0)
    after, stream_after = trained(ComputeMonitor(show=False), every, **settings)
    assert every.figures
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(stream, stream_after)


def test_counts_go_on_where_a_run_resumes(tmp_path: Path) -> None:
    def run(epochs: int, monitor: ComputeMonitor, checkpoint: Path | None = None) -> Trainer:
        method = PGDAT(small(), PGD(steps=3), optimizer=sgd)
        method._checked = {True, False}
        trainer = Trainer(**{**QUIET, "max_epochs": epochs, "callbacks": [monitor]})
        trainer.fit(method, loader(), ckpt_path=checkpoint, weights_only=True)
        return trainer

    whole, part, rest = (ComputeMonitor(show=False) for _ in range(3))
    run(4, whole)
    run(1, part).save_checkpoint(tmp_path / "one.ckpt")
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)[COST_KEY]
    assert stored["networks"] == part.cost["networks"] and stored["flops"] == whole.cost["flops"] / 4
    trainer = run(4, rest, tmp_path / "one.ckpt")
    assert rest.cost["networks"] == whole.cost["networks"]
    assert (rest.cost["samples"], rest.cost["flops"]) == (whole.cost["samples"], whole.cost["flops"])
    assert rest.cost["seconds"] > stored["seconds"]
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in trainer.lightning_module.modules()]
    assert not any(hooks), "hooks stay behind"


# Catastrophic overfitting ---------------------------------------------------------------------------------------------

HEALTHY = {"clean": 0.8, "noise": 0.8, "fgsm": 0.5, "pgd": 0.4, "cosine": 0.7, "self_alone": 0.1, "self_other": 0.05}
COLLAPSED = {"clean": 0.7, "noise": 0.7, "fgsm": 0.95, "pgd": 0.02, "cosine": 0.1, "self_alone": 0.9, "self_other": 0.8}


def derived(figures: dict[str, float], **other: float) -> dict[str, float]:
    figures = {**figures, **other}
    return {**figures, "gap": figures["fgsm"] - figures["pgd"], "ratio": figures["fgsm"] / figures["clean"]}


@pytest.mark.parametrize(
    ("now", "names"),
    [
        (derived(HEALTHY), []),
        (derived(COLLAPSED), ["drop", "gap", "cosine", "above_clean", "ratio", "self_information"]),
        (derived(HEALTHY, pgd=0.19, fgsm=0.4), ["drop"]),  # the gap is below its bound
        (derived(HEALTHY, pgd=0.21, fgsm=0.49), []),  # and here FGSM's accuracy did not rise
        (derived(HEALTHY, pgd=0.3, fgsm=0.56), ["gap"]),
        (derived(HEALTHY, cosine=0.19), ["cosine"]),
        (derived(HEALTHY, clean=0.45), ["above_clean", "ratio"]),
        (derived(HEALTHY, clean=0.6), ["ratio"]),
        (derived(HEALTHY, self_other=0.51), ["self_information"]),
    ],
)
def test_rules_by_hand(now: dict[str, float], names: list[str]) -> None:
    assert CatastrophicOverfitting(ratio=0.82).rules(now, derived(HEALTHY)) == names
    quiet = CatastrophicOverfitting(drop=None, gap=None, cosine=None, above_clean=None, self_information=None)
    assert quiet.rules(now, derived(HEALTHY)) == []


EPS = 0.2


class Wavy(nn.Module):
    """Right at x and at x + eps * sign, and wrong between them: the margin of class 0 is 0.5 + sin(pi * delta / eps) ."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        margin = self.scale * (0.5 + torch.sin(torch.pi * (x - 0.5) / EPS).flatten(1).mean(1))
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def wavy_data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)), 16)


def test_a_network_that_only_survives_single_steps_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    overfitting = CatastrophicOverfitting(eps=EPS, samples=64, action="stop")
    method = StandardTraining(Wavy(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), num_classes=2)
    trainer = fit(method, overfitting, data=wavy_data(), max_epochs=5)
    figures = overfitting.figures
    assert figures["clean"] == figures["fgsm"] == 1.0
    # It falls to -0.5 from every start below 0.1; from above, which a quarter of the starts is, it climbs.
    assert figures["pgd"] < 0.4 and figures["gap"] == 1 - figures["pgd"]
    x, y = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    index = torch.arange(64)
    x_adv = PGD(EPS, EPS / 4, 10).run(method, x, y, index=index).x_adv
    assert figures["pgd"] == pytest.approx((method(x_adv).argmax(1) == y).double().mean().item())
    start = PGD(EPS, EPS / 4, 1).run(method, x, y, index=index).start
    # In one dimension a cosine is a sign: the slope at x rises, and so does that at the random point where cos is above 0.
    assert figures["cosine"] == pytest.approx(torch.cos(torch.pi * (start - 0.5) / EPS).sign().mean().item(), abs=1e-6)
    assert overfitting.events == 1 and overfitting.overfit
    assert trainer.current_epoch == 1, "the run stops at the end of the first epoch"
    assert "Catastrophic overfitting at step 4 (gap" in capsys.readouterr().out


class Collapse(Callback):
    """Ruins weights and momentum at a step, before the monitor looks."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.before: dict[str, Tensor] = {}
        self.momentum: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        if trainer.global_step == self.at - 1:
            self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}
            self.momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
        if trainer.global_step == self.at:
            for parameter in pl_module.parameters():
                parameter.data.zero_()


class Script(CatastrophicOverfitting):
    """Judges by whether the weights are zero."""

    module: nn.Module

    def rules(self, now: dict[str, float], before: dict[str, float]) -> list[str]:
        return ["planted"] if not any(p.any() for p in self.module.parameters()) else []


class After(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 3:
            self.weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
            self.momentum = [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values()]
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("max_rollbacks", [0, 3])
def test_a_rollback_restores_weights_and_momentum_bit_for_bit(max_rollbacks: int) -> None:
    method = PGDAT(small(), FGSM(eps=0.1), optimizer=sgd)
    collapse, after = Collapse(3), After()
    settings = {"samples": 16, "steps": 1, "action": "rollback", "max_rollbacks": max_rollbacks}
    overfitting = Script(every_n_steps=1, **settings)
    overfitting.module = method.net
    trainer = fit(method, collapse, overfitting, after)
    for name, tensor in collapse.before.items():
        assert torch.equal(tensor, after.weights[name]), name
    assert len(after.momentum) == len(collapse.momentum) > 0
    assert all(torch.equal(a, b) for a, b in zip(after.momentum, collapse.momentum, strict=True))
    assert (overfitting.events, overfitting.rollbacks) == (1, 1)
    if max_rollbacks == 0:
        assert trainer.global_step == 3 and method.attack.step_size is None
        assert all(torch.equal(method.state_dict()[name], tensor) for name, tensor in collapse.before.items())
    else:
        assert trainer.global_step == 6 and method.attack.step_size == pytest.approx(0.05)
        moved = [torch.equal(method.state_dict()[name], t) for name, t in collapse.before.items() if t.is_floating_point()]
        assert not all(moved), "training goes on, and the snapshot is not what it goes on in"


def test_the_state_of_the_monitor_survives_a_resume() -> None:
    first = Script(every_n_steps=1, samples=16, steps=1, action="rollback", smoothing=0.5)
    method = PGDAT(small(), FGSM(eps=0.1), optimizer=sgd)
    first.module = method.net
    fit(method, Collapse(3), first, max_steps=3, max_epochs=-1)
    again = CatastrophicOverfitting(action="rollback")
    again.load_state_dict(first.state_dict())
    resumed = PGDAT(small(), FGSM(eps=0.1), optimizer=sgd)
    fit(resumed, again, max_epochs=1)
    assert resumed.attack.step_size == pytest.approx(0.05)
    assert (again.events, again.rollbacks) == (1, 1)
    fit(resumed, again, max_epochs=1)
    assert resumed.attack.step_size == pytest.approx(0.05), "a second fit scales nothing once more"


def test_signals_are_smoothed() -> None:
    class Record(Callback):
        def __init__(self, monitor: CatastrophicOverfitting) -> None:
            self.monitor, self.seen = monitor, []

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append(self.monitor.figures["cosine"])

    raw, smooth = (
        Record(CatastrophicOverfitting(every_n_steps=1, samples=16, steps=1, smoothing=kept)) for kept in (0.0, 0.75)
    )
    for record in (raw, smooth):
        fit(PGDAT(small(), FGSM(eps=0.1), optimizer=sgd), record.monitor, record, max_steps=4, max_epochs=-1)
    expected = raw.seen[0]
    for value in raw.seen[1:]:
        expected = 0.75 * expected + 0.25 * value
    assert smooth.seen[-1] == pytest.approx(expected) and len(set(raw.seen)) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples=1 must be at least 2"),
        ({"smoothing": 1.0}, r"smoothing=1.0 must lie in \[0, 1\)"),
        ({"step_factor": 0.0}, "step_factor=0.0"),
        ({"action": "halt"}, "action"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CatastrophicOverfitting(**settings)


def test_a_run_without_an_attack_must_name_a_radius() -> None:
    with pytest.raises(ValueError, match="give CatastrophicOverfitting eps"):
        fit(StandardTraining(small(), optimizer=sgd), CatastrophicOverfitting())
    with pytest.raises(ValueError, match="set step_factor=1"):
        fit(StandardTraining(small(), optimizer=sgd), CatastrophicOverfitting(eps=0.1, action="rollback"))


# Robust overfitting ---------------------------------------------------------------------------------------------------


class Planted(StandardTraining):
    """Logs the accuracy that it is told."""

    values = (0.2, 0.5, 0.4, 0.45, 0.3)

    def on_validation_epoch_end(self) -> None:
        self.log("val/planted", self.values[self.current_epoch])


def test_best_last_and_gap(capsys: pytest.CaptureFixture[str]) -> None:
    data = DigitsDataModule(batch_size=256, augment=False)
    overfitting = RobustOverfitting("val/planted", samples=100)
    method = Planted(small(), optimizer=sgd)
    attack = PGD(eps=0.1, steps=2)
    fit(method, overfitting, attack, data=data, max_epochs=5, limit_val_batches=1.0)
    assert [entry["val"] for entry in overfitting.history] == pytest.approx(Planted.values)
    assert overfitting.best["epoch"] == 1
    last = overfitting.history[-1]
    assert "50.00% at best (epoch 1), 30.00% at the end (epoch 4): 20.00 points lost" in capsys.readouterr().out
    assert last["gap"] == pytest.approx(last["train"] - 0.3)
    # The same samples without a Trainer.
    index = data.split[0][torch.arange(100) * len(data.split[0]) // 100]
    x, y = data.train_set.read(index, None)
    right = method.eval()(x).argmax(1) == y
    attack.name = "pgd"
    right &= method(attack.run(method, x, y, index=index).x_adv).argmax(1) == y
    assert last["train"] == pytest.approx(right.double().mean().item())


def test_patience_stops_and_survives_a_resume() -> None:
    data = DigitsDataModule(batch_size=256)
    overfitting = RobustOverfitting("val/planted", samples=10, patience=2)
    trainer = fit(Planted(small(), optimizer=sgd), overfitting, data=data, max_epochs=5, limit_val_batches=1.0)
    assert trainer.current_epoch == 4 and len(overfitting.history) == 4
    again = RobustOverfitting("val/planted", samples=10)
    again.load_state_dict(overfitting.state_dict())
    assert again.best == overfitting.best and again.best["val"] == pytest.approx(0.5)


def test_a_metric_that_nobody_logs_is_refused() -> None:
    with pytest.raises(ValueError, match="monitor='val/acc_wurst' is not logged in validation: choose one of val/acc_clean"):
        method = StandardTraining(small(), optimizer=sgd)
        fit(method, RobustOverfitting("val/acc_wurst"), data=DigitsDataModule(batch_size=256), limit_val_batches=1.0)


# Command line and reports ---------------------------------------------------------------------------------------------


def test_fit_prints_the_cost_and_the_report_of_a_test_holds_it(
    robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = "--trainer.callbacks+=CatastrophicOverfitting", "--trainer.callbacks+=RobustOverfitting"
    logger = "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.init_args.save_dir=log"
    robust_pl("fit", "-c", tiny, *callbacks, *logger)
    said = capsys.readouterr().out
    assert "backward passes to the weights" in said and "CPU hours" in said and "Robust overfitting: val/acc_worst" in said
    cost = json.loads(Path("runs/tiny/compute.json").read_text())
    # 10 steps of 128 samples an epoch, PGD-2, and the look at two samples of the first batch.
    samples = cost["samples"]
    assert samples % 128 == 0
    assert list(cost["networks"]["net"]["training"].values()) == [3 * samples + 2, 2 * samples, samples]
    logged = next(Path("log").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"cost/flops", "cost/device_hours", "monitor/co_pgd", "monitor/co_events", "monitor/ro_lost"} <= set(logged)
    stored = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)[COST_KEY]
    assert stored["networks"]["net"]["training"] == cost["networks"]["net"]["training"]

    robust_pl("test", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")
    text = Path("runs/tiny/test/report.md").read_text()
    assert "## Cost of the training" in text
    assert f"| forward passes | {3 * samples + 2:,} | 3.001 |" in text
    assert f"| FLOPs | {cost['flops']:.4g} |" in text
    named = ("--model.init_args.weights", "runs/tiny/checkpoints/last.ckpt", "--run.name", "named")
    robust_pl("test", "-c", tiny, *named, "--attacks", "{}")
    assert f"| FLOPs | {cost['flops']:.4g} |" in Path("runs/named/test/report.md").read_text()


def test_a_users_own_monitor_takes_the_place_of_ours(
    robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--trainer.callbacks+=ComputeMonitor", "--trainer.callbacks.show=false")
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, *own)
    assert "CPU hours" not in capsys.readouterr().out
    assert Path("runs/tiny/compute.json").is_file()


def test_a_report_without_a_cost_lacks_the_section() -> None:
    columns = {name: torch.zeros(1, dtype=torch.int64) for name in ("index", "label", "prediction")}
    assert "Cost of the training" not in as_markdown(Table(columns, {"cost": None}))


@pytest.mark.slow
def test_two_processes_count_what_both_do_and_judge_alike(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    common = ("fit", "-c", "tiny.yaml", "--data.init_args.batch_size")
    callbacks = ("--trainer.callbacks+=CatastrophicOverfitting", "--trainer.callbacks.samples=101")
    callbacks += ("--trainer.callbacks.action=stop", "--trainer.callbacks.gap=-1")
    robust_pl_process(tmp_path, *common, "128", "--run.name", "one", *callbacks)
    said = robust_pl_process(tmp_path, *common, "64", "--run.name", "two", *DDP, "2", *callbacks)
    assert said.count("Catastrophic overfitting at step 10") == 1
    one, two = (json.loads((tmp_path / "runs" / name / "compute.json").read_text()) for name in ("one", "two"))
    assert one["samples"] == two["samples"] > 0
    assert two["devices"] == 2 and two["device_hours"] == pytest.approx(two["seconds"] / 1800)
    one, two = (cost["networks"]["net"] for cost in (one, two))
    two["training"]["forwards"] -= 2  # both processes look at the first batch
    assert one["training"] == two["training"]


def test_passes_that_leave_a_part_of_a_wrapper_out_are_counted() -> None:
    """AFA's first stage attacks and trains past the predictor that stands beside its network: 2 steps, then two passes."""
    net = AdaptiveDualNet(SmallCNN(width=4), in_channels=1)
    method = AFA(net, PGD(0.1, steps=2), adaptive_share=0.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    method._checked = {True, False}
    monitor = ComputeMonitor(show=False)
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[monitor], limit_val_batches=0, **quiet)
    trainer.fit(method, DataLoader(TensorDataset(x, y), 8))
    assert monitor.cost["networks"]["net"]["training"]["forwards"] == 16 * (2 + 2)
