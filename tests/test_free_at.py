"""FreeAT: what a replay does to weights and perturbation, what it costs, and that a run resumes bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import AWP, FGSM, PGD
from robust_pl.methods import Cosine, Example, FreeAT, MultiStep
from robust_pl.nets import SmallCNN

from .test_ddp import DDP, folder, run  # noqa: F401
from .test_methods import QUIET, loader, sgd


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def batches(x: Tensor, y: Tensor, size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), size)


def test_replays_by_hand() -> None:
    """Two batches, the second smaller, of two replays each on a linear network, in float64."""
    torch.manual_seed(0)
    x, y = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    x[0, 0, 0, 0], x[3, 0, 1, 1] = 0.02, 0.99
    net, eps, lr = Linear().double(), 0.1, 0.5
    weight = net.layer.weight.detach().clone()
    method = FreeAT(net, FGSM(eps=eps), replays=2, optimizer=lambda p: torch.optim.SGD(p, lr=lr), num_classes=3).double()
    Trainer(max_epochs=1, limit_val_batches=0, precision="64-true", **QUIET).fit(method, batches(x, y, 3))

    delta = torch.zeros(3, 4, dtype=torch.float64)
    for part, labels in ((x[:3], y[:3]), (x[3:], y[3:])):
        flat, n = part.flatten(1), len(part)
        for _ in range(2):
            seen = (flat + delta[:n]).clamp(0, 1)
            error = ((seen @ weight.T).softmax(1) - F.one_hot(labels, 3)) / n
            by_input, by_weight = error @ weight, error.T @ seen
            delta[:n] = (flat + (delta[:n] + eps * by_input.sign()).clamp(-eps, eps)).clamp(0, 1) - flat
            weight = weight - lr * by_weight
    assert torch.allclose(method._delta.flatten(1), delta, atol=1e-12, rtol=0)
    assert torch.allclose(net.layer.weight, weight, atol=1e-12, rtol=0)


def test_a_batch_costs_one_pass_a_replay_and_steps_count_replays() -> None:
    class Counted(SmallCNN):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return super().forward(x)

    class Backwards(Callback):
        seen, steps = 0, 0

        def on_before_backward(self, *args: Any) -> None:
            self.seen += 1

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.steps = trainer.global_step

    net, counter = Counted(width=4), Backwards()
    method = FreeAT(net, replays=5, optimizer=sgd)
    method._checked = {True, False}
    Trainer(max_epochs=2, limit_val_batches=0, callbacks=[counter], **QUIET).fit(method, loader())
    assert net.forwards == counter.seen == counter.steps == 2 * 3 * 5
    assert method.attack.forwards == method.attack.backwards == 0


class Watched(FreeAT):
    """Records what the network sees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples: list[Example] = []
        self.rates: list[float] = []

    def loss(self, example: Example) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().loss(example)

    def after_step(self, example: Example) -> None:
        self.examples.append(example)


def test_the_network_sees_the_ball_and_the_box_and_a_perturbation_that_goes_on() -> None:
    for precision in ("32", "bf16-mixed", "bf16-true"):
        method = Watched(SmallCNN(width=4), FGSM(eps=0.1), replays=3, optimizer=sgd)
        Trainer(max_epochs=1, limit_val_batches=0, precision=precision, **QUIET).fit(method, loader(n=20))
        assert len(method.examples) == 9
        slack = 1e-6 if precision != "bf16-true" else 2**-8
        for example in method.examples:
            assert example.x_adv.min() >= 0 and example.x_adv.max() <= 1 and not example.x_adv.requires_grad
            assert (example.x_adv - example.x).abs().max() <= 0.1 + slack
        assert torch.equal(method.examples[0].x_adv, method.examples[0].x)
        assert not torch.equal(method.examples[3].x_adv, method.examples[3].x)
        assert method._delta.shape == (8, 1, 8, 8) and method._delta.dtype == torch.float32
        assert method._delta.abs().max() <= 0.1 + 1e-7


def test_schedules_are_laid_over_replays() -> None:
    method = Watched(SmallCNN(width=4), replays=4, optimizer=sgd, schedule=Cosine())
    Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(method, loader())
    expected = [0.1 * (1 + math.cos(math.pi * t / 24)) / 2 for t in range(24)]
    assert method.rates == pytest.approx(expected)
    method = Watched(SmallCNN(width=4), replays=2, optimizer=sgd, schedule=MultiStep([1, 2]))
    Trainer(max_epochs=3, limit_val_batches=0, limit_train_batches=2, **QUIET).fit(method, loader())
    assert method.rates == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)
    method = Watched(SmallCNN(width=4), replays=4, optimizer=sgd, schedule=Cosine())
    trainer = Trainer(max_epochs=5, max_steps=8, limit_val_batches=0, **QUIET)
    trainer.fit(method, loader())
    assert method._length == 8 and trainer.global_step == 8


FREE = """
model:
  class_path: FreeAT
  init_args:
    net: {class_path: SmallCNN, init_args: {width: 4}}
    attack: {class_path: FGSM, init_args: {eps: 0.1}}
    replays: 2
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
    schedule: {class_path: SCHEDULE}
data:
  class_path: DigitsDataModule
  init_args: {batch_size: 128, augment: true}
attacks:
  fgsm: {class_path: FGSM, init_args: {eps: 0.1}}
trainer: {max_epochs: 3, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


class Crash(Callback):
    """After the fifth batch, whose ten replays lie four after a checkpoint."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 10:
            raise RuntimeError("crash")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["Cosine", "MultiStep"])
@pytest.mark.parametrize("stop", ["tests.stopper.StopAfterEpoch", "tests.test_free_at.Crash"])
def test_resumed_equals_uninterrupted_with_its_perturbation(
    robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, stop: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("free.yaml").write_text(FREE.replace("SCHEDULE", schedule))
    common = ("fit", "-c", "free.yaml", *(("--run.save_every_n_steps", 6) if stop.endswith("Crash") else ()))
    robust_pl(*common, "--run.name", "whole")
    stopped = (*common, "--run.name", "stopped", f"--trainer.callbacks+={stop}")
    if stop.endswith("Crash"):
        with pytest.raises(RuntimeError, match="crash"):
            robust_pl(*stopped)
    else:
        robust_pl(*stopped)
    robust_pl(*common, "--ckpt_path", "runs/stopped/checkpoints/last.ckpt", "--run.name", "resumed")
    whole, part, resumed = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "stopped", "resumed")
    )
    assert part["global_step"] < whole["global_step"] == resumed["global_step"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    (delta,), (again,) = whole["robust_pl_free_at"]["delta"], resumed["robust_pl_free_at"]["delta"]
    assert delta.abs().max() > 0.05 and torch.equal(delta, again)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FreeAT(SmallCNN(), replays=0), ValueError, "replays=0"),
        (lambda: FreeAT(SmallCNN(), PGD()), TypeError, "PGD"),
        (lambda: FreeAT(SmallCNN(), FGSM(random_start=True)), ValueError, "random_start"),
        (lambda: FreeAT(SmallCNN(), FGSM(objective="margin")), ValueError, "'margin'"),
        (lambda: FreeAT(SmallCNN(), FGSM(eps=torch.full((2, 1, 1, 1), 0.1))), ValueError, "one number"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"accumulate_grad_batches": 2}, MisconfigurationException, "accumulation is not supported"),
        ({"gradient_clip_val": 1.0}, MisconfigurationException, "clipping is not supported"),
        ({"callbacks": [AWP()]}, ValueError, "AWP cannot be combined with FreeAT: its replays"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_any_step(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    method = FreeAT(SmallCNN(width=4))
    with pytest.raises(error, match=message):
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET, **settings).fit(method, loader())


@pytest.mark.slow
def test_two_processes_share_weights_and_keep_their_own_perturbations(folder: Path) -> None:  # noqa: F811
    (folder / "free.yaml").write_text(FREE.replace("SCHEDULE", "Cosine"))
    common = ("fit", "-c", "free.yaml", *DDP, "2", "--data.init_args.batch_size", "64")
    run(folder, *common, "--run.name", "whole", "--trainer.callbacks+=probe.Probe")
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True)["weights"] for rank in (0, 1))
    for name, value in first.items():
        if "running" not in name:
            assert torch.equal(value, second[name]), name
    run(folder, *common, "--run.name", "part", "--trainer.callbacks+=probe.StopAfterEpoch")
    run(folder, *common, "--ckpt_path", "runs/part/checkpoints/last.ckpt")
    whole, resumed = (
        torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "part")
    )
    for name in whole["state_dict"]:
        assert torch.equal(whole["state_dict"][name], resumed["state_dict"][name]), name
    deltas = whole["robust_pl_free_at"]["delta"]
    assert not torch.equal(*deltas)
    assert all(torch.equal(a, b) for a, b in zip(deltas, resumed["robust_pl_free_at"]["delta"], strict=True))
