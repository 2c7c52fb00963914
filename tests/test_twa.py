"""Trainable weight averaging, Sub-AT, and data held out from an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from robust_pl.callbacks import AWP, EMA, FGSM, SubspaceTraining, WeightTrajectory
from robust_pl.data import DigitsDataModule, HeldOut
from robust_pl.methods import PGDAT, TWA, LayerwiseTWA, Method, SubspaceAT
from robust_pl.nets import SmallCNN, read_trajectory

from .test_methods import QUIET, Counted, loader
from .test_subspace import flat

T = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of four moments of a fit."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    method = PGDAT(SmallCNN(width=2), FGSM(0.1), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    trainer = Trainer(max_epochs=T - 1, limit_val_batches=0, default_root_dir=folder, callbacks=[WeightTrajectory()], **QUIET)
    trainer.fit(method, loader())
    return folder


def fit(method: Method, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    chosen = {"max_epochs": 2, "limit_val_batches": 0, "default_root_dir": folder, **QUIET, **settings}
    trainer = Trainer(callbacks=list(callbacks), **chosen)
    trainer.fit(method, loader(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


def build(kind: type[TWA], run: Path, seed: int = 3, attack: FGSM | None = None, **more: Any) -> TWA:
    torch.manual_seed(seed)
    return kind(SmallCNN(width=2), str(run), attack, **more)


def weights(module: Method) -> Tensor:
    return flat(dict(module.net.named_parameters()), module.net)


def samples(run: Path, module: Method) -> Tensor:
    return torch.stack([flat(sample, module.net) for sample in read_trajectory(run).of(module.net)])


@pytest.mark.parametrize("kind", [TWA, LayerwiseTWA])
def test_it_starts_at_the_mean(kind: type[TWA], run: Path, tmp_path: Path) -> None:
    module = build(kind, run, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    fit(module, tmp_path, max_epochs=1)
    torch.testing.assert_close(weights(module), samples(run, module).mean(0), atol=1e-7, rtol=1e-6)


def test_weights_are_an_average_of_the_samples_with_free_coefficients(run: Path, tmp_path: Path) -> None:
    module = build(TWA, run, optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1))
    fit(module, tmp_path)
    w, theta = samples(run, module), weights(module)
    beta = torch.linalg.lstsq(w.T, theta).solution
    assert (w.T @ beta - theta).norm() < 1e-4 * (theta - w.mean(0)).norm()
    assert (beta - 1 / T).abs().max() > 0.01


def test_a_step_is_one_of_the_coefficients_in_an_orthonormal_basis(run: Path, tmp_path: Path) -> None:
    """theta = Q eta by autograd through Q, with numpy's QR: another way to the same weights."""
    module = build(TWA, run, optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1))
    fit(module, tmp_path, max_epochs=1, max_steps=3)
    w = samples(run, module)
    q = torch.linalg.qr(w.T).Q
    eta = (q.T @ w.mean(0)).requires_grad_()
    net = SmallCNN(width=2).double()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([eta], lr=0.5, momentum=0.9, weight_decay=0.1)
    for x, y in loader():
        parts = (q @ eta).split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(net, named, (x.double(),)), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), (q @ eta).detach(), atol=1e-4, rtol=1e-3)


def test_layerwise_steps_are_those_of_its_formula(run: Path, tmp_path: Path) -> None:
    module = build(LayerwiseTWA, run, optimizer=lambda params: torch.optim.AdamW(params, lr=0.05))
    fit(module, tmp_path, max_epochs=1, max_steps=3)
    net = SmallCNN(width=2).double()
    read = read_trajectory(run).of(net)
    layers = {name: torch.stack([s[name].double() for s in read]) for name, _ in net.named_parameters()}
    away = {name: layer - layer.mean(0) for name, layer in layers.items()}
    c = torch.zeros(len(layers), T, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([c], lr=0.05)

    def combined() -> dict[str, Tensor]:
        return {
            name: layers[name].mean(0) + torch.einsum("t,t...->...", c[i] / d.flatten(1).norm(dim=1), d)
            for i, (name, d) in enumerate(away.items())
        }

    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(net, combined(), (x.double(),)), y).backward()
        optimizer.step()
    # Adam takes signs of gradients that are nearly 0, so single precision shows.
    torch.testing.assert_close(module.coefficients.double(), c.detach(), atol=5e-3, rtol=0)
    for name, tensor in combined().items():
        torch.testing.assert_close(dict(module.net.named_parameters())[name].double(), tensor, atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", [TWA, LayerwiseTWA])
@pytest.mark.parametrize("attack", [None, FGSM(0.1)], ids=["clean", "attacked"])
def test_resumed_equals_uninterrupted(kind: type[TWA], attack: FGSM | None, run: Path, tmp_path: Path) -> None:
    whole = build(kind, run, attack=attack)
    fit(whole, tmp_path)
    trainer = fit(build(kind, run, attack=attack), tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = build(kind, run, seed=9, attack=attack)
    fit(resumed, tmp_path, ckpt_path=tmp_path / "x.ckpt")
    for ours, theirs in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_running_statistics_are_those_of_the_trained_average(run: Path, tmp_path: Path) -> None:
    module = build(TWA, run)
    fit(module, tmp_path, max_epochs=1)
    with torch.no_grad():
        means = torch.stack([module.net.layers[0](x).mean((0, 2, 3)) for x, _ in loader()])
    torch.testing.assert_close(module.net.layers[1].running_mean, means.mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [TWA, LayerwiseTWA])
def test_a_matrix_in_fewer_bits_comes_near(kind: type[TWA], run: Path, tmp_path: Path) -> None:
    found = []
    for storage in ("float32", "bfloat16", "int8"):
        module = build(kind, run, storage=storage)
        fit(module, tmp_path, max_epochs=1, max_steps=2)
        found.append(weights(module))
    mean = samples(run, module).mean(0)
    for rough in found[1:]:
        assert 0 < (rough - found[0]).norm() < 0.2 * (found[0] - mean).norm()


@pytest.mark.parametrize(
    ("build", "attacks", "trainings"),
    [
        (lambda net, run: TWA(net, run, batches=0), 0, 1),
        (lambda net, run: TWA(net, run, FGSM(0.1), batches=0), 1, 1),
        (lambda net, run: LayerwiseTWA(net, run, batches=0), 0, 1),
        (lambda net, run: SubspaceAT(net, run, dim=2), 1, 1),
    ],
    ids=["TWA", "TWA+FGSM", "LayerwiseTWA", "SubspaceAT"],
)
def test_a_step_costs_what_its_docstring_says(build: Any, attacks: int, trainings: int, tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(Counted().state_dict(), tmp_path / f"{seed}.pt")
    net = Counted()
    method = build(net, str(tmp_path))
    method._checked = {True, False}
    fit(method, tmp_path, max_steps=3)
    assert (net.forwards, net.for_training) == (3 * (attacks + trainings), 3 * trainings)
    if attacks:
        assert (method.attack.forwards, method.attack.backwards) == (24, 24)


@pytest.mark.parametrize(
    ("make", "callbacks", "message"),
    [
        (lambda run: TWA(SmallCNN(width=2), run, batches=-1), (), "batches=-1"),
        (lambda run: TWA(SmallCNN(width=2), run, skip=3), (), "skip=3 leaves 1"),
        (lambda run: TWA(SmallCNN(width=3), run), (), "another network"),
        (lambda run: LayerwiseTWA(SmallCNN(width=3), run), (), "another network"),
        (lambda run: LayerwiseTWA(SmallCNN(width=2), run), (AWP(),), "its steps move coefficients"),
        (lambda run: LayerwiseTWA(SmallCNN(width=2), run), (EMA(),), "moves no weights"),
        (lambda run: TWA(SmallCNN(width=2), run, weights=f"{run}/trajectory/00003.safetensors"), (), "weight_decay"),
        (lambda run: SubspaceAT(SmallCNN(width=2), run), (), "dim=80: 4 samples span at most 3"),
    ],
)
def test_what_cannot_work_is_refused(
    make: Any, callbacks: tuple[Callback, ...], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make(str(run)), tmp_path, *callbacks)


# Sub-AT --------------------------------------------------------------------------------------------------------------


def test_subspace_at_is_adversarial_training_with_the_callback(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = SubspaceAT(SmallCNN(width=2), str(run), FGSM(0.1), dim=2)
    fit(whole, tmp_path)
    torch.manual_seed(2)
    parts = PGDAT(SmallCNN(width=2), FGSM(0.1), lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9))
    fit(parts, tmp_path, SubspaceTraining(str(run), dim=2))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    attack = SubspaceAT(SmallCNN(), str(run)).attack
    assert isinstance(attack, FGSM) and (attack.eps, attack.step_size) == (16 / 255, 20 / 255)
    assert attack.random_start is True and attack.bn_mode == "train"


# Held-out data -------------------------------------------------------------------------------------------------------


def test_held_out_data_are_the_validation_samples_of_the_earlier_run() -> None:
    earlier = DigitsDataModule(val_size=0.2, seed=4)
    held = HeldOut(DigitsDataModule(val_size=0.2, batch_size=16), seed=4, val_size=0.25)
    learn, select = held.split
    assert torch.equal(torch.cat([learn, select]).sort().values, earlier.split[1])
    assert len(select) == round(0.25 * len(earlier.split[1]))
    seen = torch.cat([index for _, _, index in held.train_dataloader()])
    assert set(seen.tolist()) <= set(learn.tolist()) and len(seen) == len(learn) // 16 * 16
    x, y, index = next(iter(held.val_dataloader()))
    wanted, labels = earlier.train_set.read(index, None)
    assert torch.equal(x, wanted) and torch.equal(y, labels)
    assert len(held.test_set) == 360 and held.num_classes == 10 and held.in_channels == 1
    assert "data" not in held.hparams and not held.augment
    assert (
        HeldOut(DigitsDataModule(augment=True)).augment and not HeldOut(DigitsDataModule(augment=True), augment=False).augment
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeldOut(DigitsDataModule(val_size=0)), "holds nothing out"),
        (lambda: HeldOut(DigitsDataModule(val_size=10), val_size=10).split, "leaves nothing to learn from"),
    ],
)
def test_nothing_held_out(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_the_whole_way_from_configs(tmp_path: Path, tiny: Path, robust_pl: Any) -> None:
    recorder = ["--trainer.callbacks", "[{class_path: WeightTrajectory}]"]
    robust_pl("fit", "-c", tiny, *recorder, "--run.name", "source")
    assert len(read_trajectory("runs/source")) == 3
    text = (
        tiny.read_text()
        .replace("class_path: PGDAT", "class_path: TWA")
        .replace("    net:", "    trajectory: runs/source\n    net:", 1)
    )
    data = text.index("data:\n")
    attacks = text.index("attacks:\n")
    held = "data:\n  class_path: HeldOut\n  init_args:\n    batch_size: 32\n    data:\n      class_path: DigitsDataModule\n"
    Path("twa.yaml").write_text(text[:data] + held + text[attacks:])
    robust_pl("fit", "-c", "twa.yaml", "--model.init_args.optimizer.init_args.lr", "0.5")
    robust_pl("test", "--ckpt_path", "runs/twa/checkpoints/best.ckpt")
    sub = tiny.read_text().replace("class_path: PGDAT", "class_path: SubspaceAT")
    Path("sub.yaml").write_text(sub.replace("    net:", "    trajectory: runs/source\n    dim: 2\n    net:", 1))
    robust_pl("fit", "-c", "sub.yaml")
    robust_pl("test", "--ckpt_path", "runs/sub/checkpoints/last.ckpt")
