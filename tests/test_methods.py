"""Methods: what a step costs and does, and what their base promises to subclasses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD, Attack, RobustEvaluation
from robust_pl.callbacks.attacks.problem import Problem
from robust_pl.data import DigitsDataModule, PixelAdaIN
from robust_pl.functional.gradients import input_gradient
from robust_pl.functional.losses import kl_divergence
from robust_pl.methods import (
    AAER,
    ABSLD,
    APR,
    BMTARD,
    DAT,
    ELLE,
    ELLEA,
    FGSMAT,
    FGSMCUAP,
    FGSMFUAP,
    FGSMLAW,
    FGSMMEPCS,
    FGSMPCO,
    FGSMPGI,
    FGSMRSCS,
    FGSMUAP,
    FR,
    GAT,
    IGDM,
    MART,
    MTARD,
    NFGSM,
    PGDAT,
    RSLAD,
    SAR,
    SSAT,
    TRADES,
    AdvProp,
    AugMax,
    AugMix,
    ConvergeSmooth,
    Cosine,
    Example,
    FastAT,
    FreeAT,
    GradAlign,
    Method,
    MultiGrad,
    MultiStep,
    NuAT,
    OneCycle,
    PeerAiD,
    ShapeTexture,
    StandardTraining,
    TorchSchedule,
    ZeroGrad,
)
from robust_pl.nets import DualNet, IdentityDiscretizer, SmallCNN

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def loader(n: int = 24, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


class Counted(nn.Module):
    """A network that counts its forward passes, and those that will be differentiated by its weights.

    Args:
        batch: images of a pass, so that a batch several times over counts as several; None counts calls.
    """

    def __init__(self, batch: int | None = None) -> None:
        super().__init__()
        self.net, self.batch = SmallCNN(10, width=4), batch
        self.forwards = self.for_training = 0

    def forward(self, x: Tensor) -> Tensor:
        batches = 1 if self.batch is None else len(x) // self.batch
        self.forwards += batches
        self.for_training += batches * (next(self.parameters()).requires_grad and torch.is_grad_enabled())
        return self.net(x)


@pytest.mark.parametrize(
    ("build", "attack_passes", "training_passes"),
    [
        (lambda net: StandardTraining(net, optimizer=sgd), (0, 0), 1),
        (lambda net: PGDAT(net, PGD(steps=10), optimizer=sgd), (10, 10), 1),
        (lambda net: AdvProp(DualNet(net), optimizer=sgd), (1, 1), 2),
        (lambda net: AugMix(net, optimizer=sgd), (0, 0), 3),
        (lambda net: APR(net, optimizer=sgd), (0, 0), 2),
        (lambda net: APR(net, FGSM(), optimizer=sgd), (2, 2), 2),
        (lambda net: TRADES(net, PGD(steps=10, random_start="normal"), optimizer=sgd), (11, 10), 2),
        (lambda net: FreeAT(net, replays=5, optimizer=sgd), (0, 0), 5),
        (lambda net: MART(net, PGD(steps=10, random_start="normal"), optimizer=sgd), (10, 10), 2),
        (lambda net: FR(net, PGD(steps=10), optimizer=sgd), (10, 10), 2),
        (lambda net: FR(net, PGD(steps=10), start_epoch=1, optimizer=sgd), (10, 10), 1),
        (lambda net: SAR(net, PGD(steps=10), optimizer=sgd), (10, 10), 2),
        (lambda net: PeerAiD(net, SmallCNN(width=4), PGD(steps=10, random_start="normal"), optimizer=sgd), (10, 10), 2),
        (lambda net: FGSMAT(net, optimizer=sgd), (1, 1), 1),
        (lambda net: FastAT(net, optimizer=sgd), (1, 1), 1),
        (lambda net: NFGSM(net, optimizer=sgd), (1, 1), 1),
        (lambda net: GradAlign(net, optimizer=sgd), (1, 1), 2),
        (lambda net: ZeroGrad(net, optimizer=sgd), (1, 1), 1),
        (lambda net: MultiGrad(net, optimizer=sgd), (3, 3), 1),
        (lambda net: AAER(net, optimizer=sgd), (1, 1), 1),
        (lambda net: ELLE(net, optimizer=sgd), (1, 1), 4),
        (lambda net: ELLEA(net, optimizer=sgd), (1, 1), 4),
        (lambda net: SSAT(net, optimizer=sgd), (3, 1), 1),
        (lambda net: NuAT(net, optimizer=sgd), (4 / 3, 1), 2),  # one of three batches is guided
        (lambda net: GAT(net, optimizer=sgd), (4 / 3, 1), 2),
        (lambda net: FGSMPGI(net, optimizer=sgd), (1, 1, 1), 1),
        (lambda net: FGSMUAP(net, optimizer=sgd), (1, 1, 1), 1),
        (lambda net: FGSMCUAP(net, optimizer=sgd), (1, 1, 1), 1),
        (lambda net: FGSMFUAP(net, optimizer=sgd), (2, 1, 1), 1),
        (lambda net: FGSMPCO(net, optimizer=sgd), (1, 1, 1), 2),
        (lambda net: FGSMMEPCS(net, smoothing=ConvergeSmooth(stages=[-2, 9]), optimizer=sgd), (1, 1), 2),
        (lambda net: FGSMMEPCS(net, optimizer=sgd), (1, 1, -1), 2),  # that of the benign loss is not differentiated
        (lambda net: FGSMRSCS(net, smoothing=ConvergeSmooth(stages=[-2, 9]), optimizer=sgd), (1, 1, 1), 1),
        (lambda net: FGSMLAW(net, optimizer=sgd), (1, 1), 2),
        (lambda net: FGSMLAW(net, reference="start", optimizer=sgd), (1, 1), 2),
        (lambda net: RSLAD(net, SmallCNN(width=4), optimizer=sgd), (10, 10), 2),
        (lambda net: RSLAD(net, SmallCNN(width=4), igdm=IGDM(), optimizer=sgd), (10, 10), 3),
        (lambda net: MTARD(net, SmallCNN(width=4), SmallCNN(width=4), optimizer=sgd), (10, 10), 2),
        (lambda net: BMTARD(net, SmallCNN(width=4), SmallCNN(width=4), optimizer=sgd), (10, 10), 2),
        (lambda net: ABSLD(net, SmallCNN(width=4), optimizer=sgd), (10, 10), 2),
        (lambda net: AugMax(DualNet(net), optimizer=sgd), (5, 5), 3),
        (lambda net: DAT(net, IdentityDiscretizer(), optimizer=sgd), (1, 1), 2),
        (lambda net: ShapeTexture(DualNet(net), PixelAdaIN(), optimizer=sgd), (0, 0), 2),
    ],
    ids=[
        *("StandardTraining", "PGDAT", "AdvProp", "AugMix", "APR", "APR, attacked"),
        *("TRADES", "FreeAT", "MART", "FR", "FR before its start"),
        *("SAR", "PeerAiD"),
        *("FGSMAT", "FastAT", "NFGSM", "GradAlign"),
        *("ZeroGrad", "MultiGrad", "AAER", "ELLE", "ELLEA", "SSAT", "NuAT", "GAT"),
        *("FGSMPGI", "FGSMUAP", "FGSMCUAP", "FGSMFUAP", "FGSMPCO", "FGSMMEPCS", "FGSMMEPCS, not smoothed", "FGSMRSCS"),
        *("FGSMLAW", "FGSMLAW, start"),
        *("RSLAD", "RSLAD with IGDM", "MTARD", "BMTARD", "ABSLD"),
        *("AugMax", "DAT", "ShapeTexture"),
    ],
)
def test_a_step_costs_what_its_docstring_says(
    build: Callable[[nn.Module], Method], attack_passes: tuple[float, ...], training_passes: int
) -> None:
    """Passes of the attack, forward and backward, and by how many more than its own the loss differentiates by weights."""
    forwards, backwards, *again = attack_passes
    net = Counted(8)
    method = build(net)
    method._checked = {True, False}  # the look at the first batch of a run
    indexed = DataLoader(TensorDataset(*loader().dataset.tensors, torch.arange(24)), 8)
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, indexed)
    assert net.forwards == 3 * (forwards + training_passes)
    assert net.for_training == 3 * (training_passes + sum(again))
    if method.attack is not None:
        per_sample = method.attack.forwards / 24, method.attack.backwards / 24
        assert per_sample == (forwards, backwards)


def test_default_attacks() -> None:
    attack = PGDAT(SmallCNN()).attack
    assert isinstance(attack, PGD) and (attack.eps, attack.steps, attack.random_start) == (8 / 255, 10, True)
    attack = TRADES(SmallCNN()).attack
    assert isinstance(attack, PGD) and attack.random_start == "normal" and attack.objective is None
    assert StandardTraining(SmallCNN()).attack is None


def test_trades_attacks_the_divergence_from_the_clean_prediction() -> None:
    torch.manual_seed(0)
    method = TRADES(SmallCNN(width=4), PGD(eps=0.1, steps=10, random_start="normal"), optimizer=sgd).double()
    x, y = next(iter(loader()))
    x = x.double()
    example = method.craft((x, y, torch.arange(8)))
    method.eval()
    with torch.no_grad():
        reached = kl_divergence(method(example.x_adv), method(x))
        near = kl_divergence(method(x + 0.001 * torch.randn_like(x)), method(x))
    assert (reached > 10 * near).all()
    assert (example.x_adv - x).abs().max() <= 0.1 + 1e-6


class Recorder(Method):
    """Records what `after_step` sees."""

    def __init__(self, net: nn.Module, attack: FGSM | None = None) -> None:
        super().__init__(net, attack, optimizer=sgd)
        self.seen: list[Example] = []

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y)

    def after_step(self, example: Example) -> None:
        self.seen.append(example)


@pytest.mark.parametrize("attack", [None, FGSM()])
def test_after_step_comes_once_a_real_step_with_all_its_samples(attack: FGSM | None) -> None:
    method = Recorder(SmallCNN(width=4), attack)
    data = loader(n=48)
    Trainer(max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0, **QUIET).fit(method, data)
    assert len(method.seen) == 2
    x, y = data.dataset.tensors
    assert torch.equal(torch.cat([e.x for e in method.seen]), x)
    assert torch.equal(torch.cat([e.y for e in method.seen]), y)
    assert all((e.x_adv is None) == (attack is None) for e in method.seen)


def test_attacking_changes_no_gradient_under_accumulation() -> None:
    class Grads(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.found = [p.grad.clone() for p in pl_module.parameters()]

    found = []
    for attack in (None, PGD(steps=3)):
        torch.manual_seed(0)
        grads = Grads()
        method = Recorder(SmallCNN(width=4), attack)
        Trainer(max_steps=1, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[grads], **QUIET).fit(method, loader())
        found.append(grads.found)
    # The loss looks at clean samples alone, so with the attack in eval mode nothing may differ.
    for without, with_attack in zip(*found, strict=True):
        assert torch.equal(without, with_attack)


def test_what_code_builds_is_not_stored_in_checkpoints(tmp_path: Path) -> None:
    method = PGDAT(SmallCNN(width=4), optimizer=sgd)
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(method, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"weights": None, "num_classes": 10, "attack": None, "schedule": None}


class Distilled(Method):
    """Has a second network, which cannot be copied either."""

    def __init__(self, net: nn.Module, teacher: nn.Module, temperature: float = 2.0) -> None:
        super().__init__(net, optimizer=sgd)
        self.teacher = teacher

    def loss(self, example: Example) -> Tensor:
        return F.mse_loss(self(example.x), self.teacher(example.x))


def test_a_subclass_with_another_network_saves_plain_values_alone(tmp_path: Path) -> None:
    class Teacher(SmallCNN):
        def __deepcopy__(self, memo: Any) -> None:
            raise RuntimeError("this network cannot be copied")

    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(Distilled(SmallCNN(width=4), Teacher(width=4)), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["temperature"] == 2.0 and "net" not in saved and "teacher" not in saved


def test_bf16_keeps_the_ball_in_training_and_evaluation() -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        method = PGDAT(SmallCNN(width=4), PGD(steps=2), optimizer=sgd)
        trainer = Trainer(max_epochs=1, precision=precision, callbacks=[PGD(steps=2)], **QUIET)
        trainer.fit(method, loader(), loader(seed=1))
        assert 0 <= trainer.callback_metrics["val/acc_worst"] <= trainer.callback_metrics["val/acc_clean"] <= 1


class Foreign(LightningModule):
    """Not one of our methods."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallCNN(width=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_an_attack_is_a_callback_of_any_module() -> None:
    trainer = Trainer(callbacks=[FGSM(eps=0.1), PGD(eps=0.1, steps=3)], **QUIET)
    trainer.test(Foreign(), loader(n=21), verbose=False)
    assert {"test/acc_clean", "test/acc_fgsm", "test/acc_pgd", "test/acc_worst"} <= trainer.callback_metrics.keys()
    evaluation = RobustEvaluation.ensure(trainer)
    assert {row.samples for row in evaluation.rows} == {21}


def test_two_attacks_need_two_names() -> None:
    with pytest.raises(ValueError, match="two attacks are named 'pgd'"):
        Trainer(callbacks=[PGD(steps=1), PGD(steps=2)], **QUIET).test(Foreign(), loader(), verbose=False)


def rates(schedule: Any, length: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.build(optimizer, length)
    found = []
    for _ in range(length):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules() -> None:
    assert rates(MultiStep([0.5, 0.75]), 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(MultiStep([2, 3], gamma=0.5), 4) == pytest.approx([1, 1, 0.5, 0.25])
    cosine = rates(Cosine(), 4)
    assert cosine == pytest.approx([(1 + torch.cos(torch.tensor(torch.pi * t / 4)).item()) / 2 for t in range(4)])
    warm = rates(Cosine(warmup=0.5), 8)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and warm[5:] == sorted(warm[5:], reverse=True)
    cycle = rates(OneCycle(pct_start=0.25), 8)
    assert max(cycle) == pytest.approx(1.0) and cycle.index(max(cycle)) == 1 and cycle[-1] < 0.01
    halves = TorchSchedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    assert rates(halves, 3) == pytest.approx([1, 0.5, 0.25])


def test_schedules_move_by_step_or_by_epoch() -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    for interval, distinct in (("step", 6), ("epoch", 2)):
        seen = Rates()
        method = StandardTraining(SmallCNN(width=4), optimizer=sgd, schedule=Cosine(interval=interval))
        Trainer(max_epochs=2, limit_val_batches=0, callbacks=[seen], **QUIET).fit(method, loader())
        assert len(set(seen.seen)) == distinct


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiStep([0.75, 0.5]), "must rise"),
        (lambda: MultiStep([0.5, 3]), "mix"),
        (lambda: Cosine(warmup=1.0), r"warmup=1.0"),
        (lambda: TRADES(SmallCNN(), beta=-1), "beta=-1"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Universal(Attack):
    """One perturbation for all: the sign of the mean gradient over the training set."""

    direction: Tensor | None = None

    def fit(self, model: nn.Module, data: Any) -> None:
        self.batches = 0
        total = torch.zeros(1, 1, 8, 8)
        for x, y, *_ in data:
            gradient, _ = input_gradient(model, x, lambda logits, y=y: F.cross_entropy(logits, y, reduction="none"))
            total += gradient.sum(0)
            self.batches += 1
        self.direction = total.sign()

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        return problem.project(x + problem.eps * self.direction)


def test_an_attack_may_look_at_training_data_first() -> None:
    """'Evaluation that must first see data follows the same shape: fit(model, data), then columns per sample.'"""
    torch.manual_seed(0)
    net, data = SmallCNN(width=4), DigitsDataModule(batch_size=256)
    attack = Universal(eps=0.3)
    report = evaluate(net, data, {"universal": attack})
    assert attack.batches == 5 and report.rows[1].forwards == 0
    trainer = Trainer(callbacks=[Universal(eps=0.3)], **QUIET)
    trainer.test(StandardTraining(net), data, verbose=False)
    assert trainer.callback_metrics["test/acc_universal"] == pytest.approx(report.metrics["acc_universal"], abs=1e-6)
    with pytest.raises(ValueError, match="must see training data"):
        evaluate(net, (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), {"universal": Universal()})
