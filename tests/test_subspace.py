"""Trajectories of weights, the subspaces they span, and training in them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import Tensor, nn

from robust_pl.callbacks import AWP, FGSM, SAM, SubspaceTraining, WeightTrajectory
from robust_pl.functional.subspace import Subspace, normalised, orthonormal
from robust_pl.methods import PGDAT, TWA, FreeAT, StandardTraining, SubspaceAT
from robust_pl.nets import SmallCNN, load_weights, read_trajectory

from .test_methods import QUIET, loader

SIZES = (5, 12, 3)


def samples(t: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(t, n, generator=generator, dtype=dtype) + 2 for n in SIZES]


def split(vector: Tensor) -> list[Tensor]:
    return list(vector.split(SIZES))


def dense(space: Subspace) -> Tensor:
    """The rows of P, by asking for them."""
    like = [torch.empty(n, dtype=torch.float64) for n in SIZES]
    return torch.stack([torch.cat(space.combine(unit, like)) for unit in torch.eye(space.dim, dtype=torch.float64)])


def test_centred_directions_are_those_of_pca() -> None:
    layers = samples()
    found = dense(Subspace(layers, orthonormal(layers, dim=4)))
    expected = PCA(4, svd_solver="full").fit(torch.cat(layers, 1).numpy()).components_
    signs = np.sign((found.numpy() * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(found.numpy() * signs, expected, atol=1e-8)


def test_directions_that_are_not_centred_span_the_samples_as_qr_does() -> None:
    layers = samples()
    rows = dense(Subspace(layers, orthonormal(layers, centred=False)))
    q = torch.linalg.qr(torch.cat(layers, 1).T).Q
    torch.testing.assert_close(rows.T @ rows, q @ q.T, atol=1e-8, rtol=0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(7, dtype=torch.float64), atol=1e-10, rtol=0)


def test_projection_by_layers_is_the_dense_one_and_idempotent() -> None:
    layers = samples()
    space = Subspace(layers, orthonormal(layers, dim=3))
    rows, g = dense(space), torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close(space.coordinates(split(g)).sum(0), rows @ g, atol=1e-10, rtol=0)
    once = torch.cat(space.project(split(g)))
    torch.testing.assert_close(once, rows.T @ (rows @ g), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cat(space.project(split(once))), once, atol=1e-10, rtol=0)


def test_shares_of_rows_add_up() -> None:
    layers = samples()
    mixing = orthonormal(layers, dim=5)
    g = split(torch.randn(20, dtype=torch.float64))
    whole = Subspace(layers, mixing)
    shares = [Subspace(layers, mixing, rows) for rows in (slice(0, 2), slice(2, 5))]
    assert sum(share.nbytes for share in shares) == whole.nbytes
    torch.testing.assert_close(sum(share.coordinates(g) for share in shares), whole.coordinates(g))
    torch.testing.assert_close(sum(torch.cat(s.project(g)) for s in shares), torch.cat(whole.project(g)))


def test_nearly_collinear_samples_give_fewer_and_still_orthonormal_directions() -> None:
    """Two samples are one, and one differs by 1e-4 of its length: classical Gram-Schmidt loses that direction in float32."""
    layers = samples(dtype=torch.float32)
    for layer in layers:
        layer[1] = layer[0]
        layer[2] = layer[0] + 1e-4 * torch.randn(layer[0].shape)
    mixing = orthonormal(layers, centred=False)
    rows = torch.cat([mixing @ layer.double() for layer in layers], 1)
    assert len(rows) == 6
    torch.testing.assert_close(rows @ rows.T, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)


def test_layers_normalised_one_by_one() -> None:
    layers = samples()
    layers[2][:] = 1.5  # a layer that never moved
    space = Subspace(layers, normalised(layers))
    unit = torch.zeros(3, 7, dtype=torch.float64)
    unit[1, 4] = 1
    combined = space.combine(unit, [torch.empty(n, dtype=torch.float64) for n in SIZES])
    away = layers[1][4] - layers[1].mean(0)
    torch.testing.assert_close(combined[1], away / away.norm(), atol=1e-8, rtol=0)
    assert not combined[0].any()
    assert not space.coordinates(split(torch.randn(20, dtype=torch.float64)))[2].any()


@pytest.mark.parametrize(("storage", "smaller", "error"), [("bfloat16", 2, 1e-2), ("int8", 3, 2e-2)])
def test_rows_in_fewer_bits(storage: Any, smaller: int, error: float) -> None:
    layers = [layer.repeat(1, 50) for layer in samples(dtype=torch.float32)]
    mixing = orthonormal(layers, dim=3)
    whole, few = Subspace(layers, mixing), Subspace(layers, mixing, storage=storage)
    g = [torch.randn(50 * n) for n in SIZES]
    assert few.nbytes * smaller <= whole.nbytes
    exact, rough = torch.cat(whole.project(g)), torch.cat(few.project(g))
    assert 0 < (rough - exact).norm() < error * torch.cat(g).norm()


@pytest.mark.parametrize(
    ("given", "dim", "centred", "message"),
    [
        (samples(3), 3, True, "3 samples span at most 2 dimensions around their mean"),
        (samples(3), 4, False, "3 samples span at most 3 dimensions: lower dim"),
        ([torch.ones(3, 4)], None, True, "all the same"),
    ],
)
def test_too_few_samples(given: Sequence[Tensor], dim: int | None, centred: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthonormal(given, dim, centred)


# Recording and reading -----------------------------------------------------------------------------------------------


def method(seed: int = 0, width: int = 2, **optimizer: Any) -> PGDAT:
    torch.manual_seed(seed)
    settings = {"lr": 0.1, "momentum": 0.9, **optimizer}
    return PGDAT(SmallCNN(width=width), FGSM(0.1), lambda params: torch.optim.SGD(params, **settings))


def fit(module: LightningModule, folder: Path, *callbacks: Callback, **trainer: Any) -> Trainer:
    settings = {"max_epochs": 2, "limit_val_batches": 0, "default_root_dir": str(folder), **QUIET, **trainer}
    found = Trainer(callbacks=list(callbacks), **settings)
    found.fit(module, loader())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(method(), folder, WeightTrajectory(times_per_epoch=2), max_epochs=4)
    return folder


def test_a_trajectory_holds_the_weights_of_each_moment(tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.weights.append(pl_module.net.linear.weight.detach().clone())

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step in (2, 3, 5, 6):
                self.on_train_start(trainer, pl_module)

    seen, module = Seen(), method()
    module.net.layers[0].weight.requires_grad_(False)
    fit(module, tmp_path, seen, WeightTrajectory(times_per_epoch=2, every_n_steps=3))
    found = read_trajectory(tmp_path)
    assert len(found) == len(seen.weights) == 5
    for sample, weight in zip(found, seen.weights, strict=True):
        assert torch.equal(sample["net.linear.weight"], weight)
    assert "net.layers.0.weight" not in found[0] and "net.layers.1.running_mean" in found[0]
    names = [file.name for file in sorted((tmp_path / "trajectory").iterdir())]
    assert names == [f"0000{i}.safetensors" for i in range(5)]


def test_batches_without_a_step_and_with_several_are_counted_right(tmp_path: Path) -> None:
    def steps(name: str, module: LightningModule, every: int, **trainer: Any) -> list[int]:
        samples = WeightTrajectory(times_per_epoch=0, at_start=False, every_n_steps=every)
        fit(module, tmp_path / name, samples, max_epochs=2, **trainer)
        files = sorted((tmp_path / name / "trajectory").iterdir())
        return [int(safe_open(file, "pt").metadata()["step"]) for file in files]

    assert steps("accumulated", method(), 1, accumulate_grad_batches=2) == [1, 2, 3, 4]  # of three batches an epoch
    assert steps("replayed", FreeAT(SmallCNN(width=2), replays=2), 3) == [4, 6, 10, 12]  # the first batch's end after 3, 6, ...


def test_a_resumed_run_goes_on_numbering(tmp_path: Path) -> None:
    fit(method(), tmp_path / "whole", WeightTrajectory(), max_epochs=3)
    trainer = fit(method(), tmp_path / "cut", WeightTrajectory(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "cut" / "trajectory" / "00002.safetensors")  # of a part that was lost
    resumed = Trainer(
        max_epochs=3, limit_val_batches=0, default_root_dir=tmp_path / "cut", callbacks=[WeightTrajectory()], **QUIET
    )
    resumed.fit(method(seed=1), loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    whole, cut = (sorted((tmp_path / name / "trajectory").iterdir()) for name in ("whole", "cut"))
    assert [file.name for file in whole] == [file.name for file in cut]
    for ours, theirs in zip(whole, cut, strict=True):
        assert all(torch.equal(tensor, load_file(theirs)[name]) for name, tensor in load_file(ours).items())


def test_another_runs_trajectory_is_not_written_over(run: Path) -> None:
    with pytest.raises(ValueError, match="already holds the trajectory of another run"):
        fit(method(), run, WeightTrajectory())


def test_what_can_be_read_as_a_trajectory(run: Path, tmp_path: Path) -> None:
    nets = [SmallCNN(width=2) for _ in range(3)]
    for number, net in zip((9, 10, 11), nets, strict=True):
        torch.save({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, tmp_path / f"epoch={number}.ckpt")
    for source in (tmp_path, [tmp_path / "epoch=9.ckpt", nets[1].state_dict(), str(tmp_path / "epoch=11.ckpt")]):
        found = read_trajectory(source).of(nets[0])
        assert [torch.equal(s["linear.weight"], n.linear.weight) for s, n in zip(found, nets, strict=True)] == [True] * 3
        expected = torch.stack([net.linear.weight for net in nets]).detach()
        assert torch.equal(found.layers(["linear.weight"])[0], expected.flatten(1))
        torch.testing.assert_close(found.mean("linear.weight"), expected.mean(0))
    load_weights(SmallCNN(width=2), read_trajectory(run)[3])
    assert len(read_trajectory(run)) == 9 and len(read_trajectory(run)[2:]) == 7


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "list of weights is empty"),
        ("nowhere", FileNotFoundError, "nowhere"),
        (".", FileNotFoundError, "holds no weights"),
    ],
)
def test_nothing_to_read(
    source: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        read_trajectory(source)


def test_weights_of_another_network(run: Path) -> None:
    with pytest.raises(ValueError, match=r"00000.safetensors.*another network"):
        read_trajectory(run).of(SmallCNN(width=3))


# Training in a subspace ----------------------------------------------------------------------------------------------


def flat(state: Any, net: nn.Module) -> Tensor:
    return torch.cat([state[name].detach().flatten() for name, _ in net.named_parameters()]).double()


def distance_from_span(folder: Path, module: PGDAT, dim: int) -> tuple[float, float]:
    """How far the weights went from sample 0, and how far from it they are outside of the span, by numpy's SVD."""
    w = torch.stack([flat(s, module.net) for s in read_trajectory(folder).of(module.net)])
    rows = torch.linalg.svd(w - w.mean(0), full_matrices=False).Vh[:dim]
    moved = flat(dict(module.net.named_parameters()), module.net) - w[0]
    return moved.norm().item(), (moved - rows.T @ (rows @ moved)).norm().item()


@pytest.mark.parametrize("perturbation", [None, AWP(0.01), SAM(0.05)], ids=["plain", "AWP", "SAM"])
def test_weights_stay_in_the_subspace(run: Path, tmp_path: Path, perturbation: Callback | None) -> None:
    module = method(seed=5, nesterov=True)
    callbacks = [SubspaceTraining(str(run), dim=4)] + ([perturbation] if perturbation is not None else [])
    fit(module, tmp_path, *callbacks, accumulate_grad_batches=2)
    moved, outside = distance_from_span(run, module, dim=4)
    assert moved > 0.01 and outside < 1e-5 * moved + 1e-6


def test_the_projected_gradient_is_that_of_the_whole_batch(run: Path, tmp_path: Path) -> None:
    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.found = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).double()

    before, after = Gradients(), Gradients()
    module = method()
    fit(module, tmp_path, before, SubspaceTraining(str(run), dim=3), after, max_steps=2, accumulate_grad_batches=2)
    w = torch.stack([flat(s, module.net) for s in read_trajectory(run).of(module.net)])
    rows = torch.linalg.svd(w - w.mean(0), full_matrices=False).Vh[:3]
    torch.testing.assert_close(after.found, rows.T @ (rows @ before.found), atol=1e-5, rtol=1e-3)
    assert before.found.norm() > 1.1 * after.found.norm()


@pytest.mark.parametrize("build", [SubspaceAT, TWA])
def test_a_second_subspace_is_refused(run: Path, tmp_path: Path, build: Any) -> None:
    with pytest.raises(ValueError, match=r"a subspace of its own: remove SubspaceTraining from trainer\.callbacks"):
        fit(build(SmallCNN(width=2), str(run)), tmp_path, SubspaceTraining(str(run)))


@pytest.mark.parametrize("start", ["first", "mean", "current"])
def test_where_it_starts(run: Path, tmp_path: Path, start: Any) -> None:
    module = method(seed=5, lr=0.0)
    own = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    fit(module, tmp_path, SubspaceTraining(str(run), start=start), max_epochs=1)
    samples = read_trajectory(run).of(module.net)
    expected = {"first": samples[0], "current": own}.get(start)
    for name, parameter in module.net.named_parameters():
        wanted = samples.mean(name) if expected is None else expected[name]
        assert torch.equal(parameter, wanted)


def test_resumed_equals_uninterrupted_and_the_basis_stays_out_of_checkpoints(run: Path, tmp_path: Path) -> None:
    whole = method(seed=5)
    fit(whole, tmp_path, SubspaceTraining(str(run), dim=4))
    trainer = fit(method(seed=5), tmp_path, SubspaceTraining(str(run), dim=4), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["SubspaceTraining"]
    assert saved["mixing"].shape == (4, 9) and list(saved) == ["mixing"]
    resumed = method(seed=7)
    again = Trainer(
        max_epochs=2, limit_val_batches=0, default_root_dir=tmp_path, callbacks=[SubspaceTraining(str(run), dim=4)], **QUIET
    )
    again.fit(resumed, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for ours, theirs in zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 9}, "9 samples span at most 8"),
        ({"skip": 8}, "skip=8 leaves 1"),
        ({"skip": -1}, "skip=-1"),
        ({"start": "last"}, "start='last'"),
        ({"storage": "int4"}, "storage='int4'"),
    ],
)
def test_bad_arguments(run: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(method(), tmp_path, SubspaceTraining(str(run), **arguments))


def test_optimizers_that_leave_the_subspace(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight_decay pulls the weights out"):
        fit(method(weight_decay=1e-4), tmp_path, SubspaceTraining(str(run)))
    adam = StandardTraining(SmallCNN(width=2), optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match="Adam scales each weight"):
        fit(adam, tmp_path, SubspaceTraining(str(run)))
    with pytest.raises(ValueError, match="another network"):
        fit(method(width=3), tmp_path, SubspaceTraining(str(run)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times_per_epoch": -1}, "times_per_epoch=-1"),
        ({"times_per_epoch": 0}, "records nothing"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ],
)
def test_bad_arguments_of_the_recorder(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightTrajectory(**arguments)


@pytest.mark.slow
def test_two_processes_share_the_basis(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.subspace_processes"]
    done = subprocess.run([*command, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    reports = json.loads(line.removeprefix("RESULT "))
    assert [report["rows"] for report in reports] == [1, 2]  # of three
    for report in reports:
        assert report["projected"] < 1e-4 and report["outside"] < 1e-4 and report["equal"]
        assert report["formula"] < 1e-5 and report["learned"] > 1e-3 and report["equal_twa"]
