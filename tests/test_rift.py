"""RiFT: criticality against pencil and paper, what stays, what is interpolated, and which checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from robust_pl.callbacks import PGD
from robust_pl.functional.criticality import Criticality, weighted_modules
from robust_pl.methods import RiFT
from robust_pl.methods.interpolation import choose
from robust_pl.nets import SmallCNN

from .conftest import TINY
from .test_ddp import DDP, run
from .test_methods import QUIET, Counted, loader
from .test_resume import assert_same_weights

QUICK = Criticality(epochs=2, batch_size=16)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "start.pt"
    torch.save(SmallCNN(width=4).state_dict(), path)
    return path


def rift(start: Path, net: nn.Module | None = None, **arguments: Any) -> RiFT:
    arguments = {"criticality": QUICK, "interpolations": 2, "optimizer": sgd, **arguments}
    return RiFT(net or SmallCNN(width=4), PGD(0.1, steps=2), weights=str(start), **arguments)


def fit(method: RiFT, callbacks: list[Callback] | None = None, epochs: int = 2, **more: Any) -> RiFT:
    trainer = Trainer(**{**QUIET, "max_epochs": epochs, "callbacks": callbacks, "num_sanity_val_steps": 0, **more})
    trainer.fit(method, loader(), loader(seed=1))
    return method


# Criticality ---------------------------------------------------------------------------------------------------------


def linear() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Two classes, W = identity, one sample (1, 2) of class 0: logits (1, 2), and the gradient (p - e) x^T."""
    net = nn.Linear(2, 2, bias=False, dtype=torch.float64).requires_grad_(False)
    net.weight.copy_(torch.eye(2))
    p = 1 / (1 + math.e)  # of class 0
    gradient = torch.tensor([[p - 1, 2 * (p - 1)], [1 - p, 2 * (1 - p)]], dtype=torch.float64)
    return net, torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([0]), gradient


def loss_at(weight: Tensor) -> float:
    first, second = (weight @ torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist()
    return math.log(1 + math.exp(second - first))


def test_one_step_inside_the_ball() -> None:
    net, x, y, gradient = linear()
    found = Criticality(radius=1, epochs=1, lr=0.1).highest_loss(net, net.weight, x, y)
    assert found.item() == pytest.approx(loss_at(torch.eye(2, dtype=torch.float64) + 0.1 * gradient), abs=1e-12)
    assert Criticality().loss(net, x, y, x.device).item() == pytest.approx(math.log(1 + math.e), abs=1e-12)
    assert torch.equal(net.weight, torch.eye(2, dtype=torch.float64)) and not net.weight.requires_grad


def test_the_step_is_projected_onto_the_ball() -> None:
    net, x, y, gradient = linear()
    found = Criticality(radius=0.1, epochs=1, lr=10).highest_loss(net, net.weight, x, y)
    moved = 0.1 * math.sqrt(2) * gradient / gradient.norm()
    assert found.item() == pytest.approx(loss_at(torch.eye(2, dtype=torch.float64) + moved), abs=1e-12)


def test_the_highest_loss_of_all_epochs_counts_and_the_weight_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = SmallCNN(width=4).eval().requires_grad_(False)
    x, y = torch.rand(40, 1, 8, 8), torch.randint(10, (40,))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weight, reached = net.layers[3].weight, []

    class Spy(Criticality):
        def loss(self, *arguments: Any) -> Tensor:
            assert (weight - before["layers.3.weight"]).norm() <= 0.1 * before["layers.3.weight"].norm() * (1 + 1e-5)
            reached.append(super().loss(*arguments))
            return reached[-1]

    found = Spy(epochs=3, batch_size=16).highest_loss(net, weight, x, y)
    assert len(reached) == 3 and found == max(reached) and found > Criticality().loss(net, x, y, x.device)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_an_ascent_that_overflows_is_as_critical_as_can_be() -> None:
    net, x, y, _ = linear()
    assert Criticality(lr=1e308, epochs=2).highest_loss(net, net.weight, 1e10 * x, y) == torch.inf
    assert torch.equal(net.weight, torch.eye(2, dtype=torch.float64))


def test_modules_that_count() -> None:
    names = list(weighted_modules(SmallCNN(width=4)))
    assert names == ["layers.0", "layers.3", "layers.6", "layers.9", "linear"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(weighted_modules(tied)) == ["0"]


def test_the_least_critical_module_is_chosen(start: Path) -> None:
    method = fit(rift(start, interpolations=1), epochs=1)
    assert set(method.found) == set(weighted_modules(method.net)) and next(iter(method.found)) == method.module
    assert list(method.found.values()) == sorted(method.found.values())
    named = fit(rift(start, module="layers.3"), epochs=1)
    assert named.module == "layers.3" and named.found == {}


# Fine-tuning and interpolation ---------------------------------------------------------------------------------------


class Keep(Callback):
    """The network at the end of the last step, before the method's own hook."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.state = {name: tensor.clone() for name, tensor in pl_module.net.state_dict().items()}


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_only_the_chosen_module_moves(start: Path, freeze_bn: bool) -> None:
    keep = Keep()
    method = fit(rift(start, module="layers.3", freeze_bn=freeze_bn), [keep])
    before = torch.load(start, weights_only=True)
    for name, tensor in keep.state.items():
        moves = name == "layers.3.weight" or (not freeze_bn and ("running" in name or "tracked" in name))
        assert torch.equal(tensor, before[name]) != moves, name
    assert all(p.requires_grad for p in method.parameters())  # a fit leaves nothing frozen behind


def test_interpolation_has_exact_ends_and_leaves_integers_alone(start: Path) -> None:
    keep = Keep()
    method = fit(rift(start, module="layers.3", freeze_bn=False), [keep])
    before, end = torch.load(start, weights_only=True), keep.state
    for alpha, wanted in ((0.0, before), (1.0, end)):
        method._go_to(alpha, end)
        for name, tensor in method.net.state_dict().items():
            assert torch.equal(tensor, (wanted if tensor.is_floating_point() else end)[name]), name
    method._go_to(0.25, end)
    for name, tensor in method.net.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * end[name])
        else:
            assert tensor.dtype == torch.int64 and tensor == 6


@pytest.mark.parametrize(
    ("clean", "robust", "tolerance", "chosen"),
    [
        ([0.8, 0.9, 0.95], [0.5, 0.5, 0.5], 0, 2),
        ([0.8, 0.9, 0.95], [0.5, 0.498, 0.4], 0.002, 1),
        ([0.8, 0.9, 0.95], [0.5, 0.497, 0.4], 0.002, 0),
        ([0.8, 0.8, 0.8], [0.5, 0.6, 0.6], 0, 1),
        ([0.8, 0.7, 0.9], [0.5, 0.4, 0.5], 0.01, 2),
    ],
)
def test_choice(clean: list[float], robust: list[float], tolerance: float, chosen: int) -> None:
    assert choose(clean, robust, tolerance) == chosen


class Score(Callback):
    """A metric that earlier epochs do better in, and what was validated."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", 1.0 / (1 + trainer.current_epoch))
        self.validated = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def test_the_best_checkpoint_holds_the_interpolated_network(start: Path, tmp_path: Path) -> None:
    score, best = Score(), ModelCheckpoint(tmp_path, "best", monitor="score", mode="max", enable_version_counter=False)
    method = rift(start, module="layers.3", tolerance=1, interpolations=4)
    method._accuracies = lambda alpha, end: (1 - abs(alpha - 0.5), 0.5)  # the middle is best
    keep = Keep()
    fit(method, [score, best, keep], epochs=3, enable_checkpointing=True)
    assert method.alpha == 0.5
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    before = torch.load(start, weights_only=True)["layers.3.weight"]
    torch.testing.assert_close(saved["net.layers.3.weight"], (before + keep.state["layers.3.weight"]) / 2)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, saved[name]) and torch.equal(tensor, score.validated[name]), name


def test_the_tables_are_measured_as_an_evaluation_would(start: Path) -> None:
    """The last row's figures, from the network and its attack at hand."""
    method = rift(start, module="linear", interpolations=1)
    fit(method, epochs=1)
    x, y = loader(seed=1).dataset.tensors
    method.eval()
    start_net = SmallCNN(width=4).eval()
    start_net.load_state_dict(torch.load(start, weights_only=True))
    clean = (start_net(x).argmax(1) == y).float().mean().item()
    x_adv = PGD(0.1, steps=2).run(start_net, x, y, index=torch.arange(24)).x_adv
    robust = (start_net(x_adv).argmax(1) == y).float().mean().item()
    metrics = method.trainer.callback_metrics
    assert metrics["rift/acc_clean_0.00"] == pytest.approx(clean) and metrics["rift/acc_robust_0.00"] == pytest.approx(robust)
    assert metrics["rift/alpha"] == method.alpha


def test_passes(start: Path) -> None:
    """24 training and 24 validation samples in 3 batches each; 5 modules, 2 epochs of ascent over 24 samples in 2 parts."""
    net = Counted()
    method = rift(start, net, interpolations=2)
    method._checked = {True, False}
    fit(method, epochs=2)
    before = 3 * 2 + 2 + 5 * 2 * (2 + 2)  # attacks, the loss, ascents with their losses
    steps, after = 2 * 3, 3 * 3 * (2 + 2)
    validation = 2 * 3
    assert net.forwards == before + steps + after + validation
    assert (method.attack.forwards, method.attack.backwards) == (24 * 2 * 4, 24 * 2 * 4)


# Resuming, processes, complaints -------------------------------------------------------------------------------------


def cli(tiny: Path, *more: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    torch.save(SmallCNN(width=4).state_dict(), "start.pt")
    model = ("--model", "RiFT", "--model.init_args.weights", "start.pt", "--model.init_args.samples", 100)
    return "fit", "-c", tiny, *model, "--model.init_args.criticality.epochs", 1, "--model.init_args.tolerance", 1, *more


@pytest.mark.slow
def test_resumed_equals_uninterrupted(robust_pl: Callable[..., None], tiny: Path) -> None:
    common = cli(tiny)
    robust_pl(*common, "--run.name", "whole")
    robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    assert torch.load("runs/stopped/checkpoints/last.ckpt", weights_only=True)["robust_pl_rift"]["alpha"] is None
    Path("start.pt").unlink()  # not needed any more
    robust_pl(*common, "--ckpt_path", "runs/stopped/checkpoints/last.ckpt")
    whole, stopped = (Path("runs", name, "checkpoints", "last.ckpt") for name in ("whole", "stopped"))
    assert_same_weights(whole, stopped)
    assert_same_weights(whole, Path("runs/whole/checkpoints/best.ckpt"))
    states = [torch.load(path, weights_only=True)["robust_pl_rift"] for path in (whole, stopped)]
    for key in ("module", "alpha", "found"):
        assert states[0][key] == states[1][key] is not None


def test_resumed_from_the_last_step_itself(robust_pl: Callable[..., None], tiny: Path) -> None:
    common = cli(tiny, "--trainer.max_epochs", 1, "--run.save_every_n_steps", 10)  # of 10
    robust_pl(*common, "--run.name", "whole")
    with pytest.raises(RuntimeError, match="crash"):
        robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.CrashInValidation")
    robust_pl(*common, "--ckpt_path", "runs/stopped/checkpoints/last.ckpt")
    assert_same_weights(*(Path("runs", name, "checkpoints", "last.ckpt") for name in ("whole", "stopped")))


@pytest.mark.slow
def test_two_processes_choose_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    torch.manual_seed(0)
    torch.save(SmallCNN(width=4).state_dict(), tmp_path / "start.pt")
    model = ("--model", "RiFT", "--model.init_args.weights", "start.pt", "--model.init_args.samples", "100")
    for name, ddp, size in (("one", (), "64"), ("two", (*DDP, "2"), "32")):
        more = ("--data.init_args.batch_size", size, "--trainer.max_epochs", "1", "--run.name", name)
        run(tmp_path, "fit", "-c", "tiny.yaml", *model, *more, *ddp)
    one, two = (torch.load(tmp_path / f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("one", "two"))
    assert one["robust_pl_rift"]["module"] == two["robust_pl_rift"]["module"]
    assert one["robust_pl_rift"]["found"] == pytest.approx(two["robust_pl_rift"]["found"], rel=1e-4)


def test_a_stopped_run_says_that_it_is_not_interpolated(start: Path) -> None:
    from .stopper import StopAfterEpoch

    with pytest.warns(UserWarning, match="not interpolated"):
        fit(rift(start, module="linear"), [StopAfterEpoch()], epochs=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda start: RiFT(SmallCNN()), "starts from a robust network"),
        (lambda start: rift(start, module="layers.1"), "module='layers.1' is no convolution .* layers.0, layers.3"),
        (lambda start: rift(start, samples=0), "samples=0"),
        (lambda start: rift(start, tolerance=-1), "tolerance=-1"),
        (lambda start: Criticality(epochs=0), "criticality.epochs=0"),
        (lambda start: Trainer(**QUIET).fit(rift(start), loader()), "validation samples and there are none"),
    ],
)
def test_complaints(start: Path, build: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(start)


def test_the_checkpoint_of_another_method_is_refused(robust_pl: Callable[..., None], tiny: Path, capsys: Any) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--run.name", "other")
    with pytest.raises(SystemExit):
        robust_pl(*cli(tiny), "--ckpt_path", "runs/other/checkpoints/last.ckpt")
    assert "another method's run" in capsys.readouterr().err
