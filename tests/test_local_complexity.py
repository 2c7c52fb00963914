"""Local complexity: hyperplanes worked out by hand, and a monitor that leaves a training bit for bit as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import LocalComplexity
from robust_pl.callbacks.monitors.preactivations import preactivations
from robust_pl.data import DigitsDataModule
from robust_pl.functional.linear_regions import cross_polytope, crossed_units, polytope_vertices
from robust_pl.methods import StandardTraining
from robust_pl.nets import SmallCNN
from robust_pl.report import Record


def test_frame_is_orthonormal_and_fixed_by_its_seed() -> None:
    frame = cross_polytope(48, 7, 3)
    assert torch.allclose(frame @ frame.T, torch.eye(7), atol=1e-6)
    state = torch.get_rng_state()
    assert torch.equal(frame, cross_polytope(48, 7, 3)) and not torch.equal(frame, cross_polytope(48, 7, 4))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="5 orthogonal directions do not fit into 4 dimensions"):
        cross_polytope(4, 5, 0)


def test_one_dimension() -> None:
    # ReLU(x - t): in one dimension v is 1 or -1, so the unit is crossed where |x - t| < r.
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        net[1].weight.fill_(1.0), net[1].bias.fill_(-0.5)
    x = torch.tensor([0.35, 0.45, 0.5, 0.55, 0.65]).view(-1, 1, 1, 1)
    counts = LocalComplexity(samples=5, vertices=2, radius=0.1).count(net, x)
    assert counts["activation 1"].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("radius", [1e-9, 0.05, 0.3])
def test_linear_layer(radius: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 40), torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    monitor = LocalComplexity(vertices=8, radius=radius, layers=["1"], batch_size=16)
    counts = monitor.count(nn.Sequential(nn.Flatten(), layer), x)["1"]
    frame = cross_polytope(12, 4, 0)
    reach = radius * (layer.weight @ frame.T).abs().amax(1)  # of each unit
    distance = layer(x.flatten(1)).abs()
    assert counts.tolist() == (distance < reach).sum(1).tolist()
    assert (counts.sum() == 0) == (radius < 1e-6)


def test_counts_rise_with_the_radius_and_do_not_see_scale_or_chunks() -> None:
    torch.manual_seed(0)
    net, x = SmallCNN(width=4).eval(), torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def first(radius: float, batch_size: int = 256) -> list[int]:
        return LocalComplexity(vertices=8, radius=radius, batch_size=batch_size).count(net, x)["activation 1"].tolist()

    assert all(a <= b for a, b in zip(first(0.01), first(0.1), strict=True)) and sum(first(0.1)) > sum(first(0.01))
    assert first(0.1) == first(0.1, 8)
    before = first(0.1)
    with torch.no_grad():
        net.layers[1].weight.mul_(3), net.layers[1].bias.mul_(3)
    assert first(0.1) == before


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x.flatten(1)), inplace=True)
        x = torch.relu(self.layers[1](x)).relu()
        return F.gelu(nn.LeakyReLU()(self.layers[2](x)))


def test_activations_are_found_as_modules_and_as_functions() -> None:
    torch.manual_seed(0)
    net, x, seen = Functional(), torch.randn(5, 4), {}
    with preactivations(None, lambda name, values: seen.setdefault(name, values.clone())):
        net(x)
    assert list(seen) == [f"activation {i}" for i in range(1, 6)]
    assert torch.equal(seen["activation 1"], net.layers[0](x)) and (seen["activation 1"] < 0).any()
    count = len(seen)
    net(x)
    assert len(seen) == count and not any(module._forward_hooks for module in net.modules())


def test_units_of_two_signs_by_hand() -> None:
    values = torch.tensor([[1.0, -1, 2, 0], [2, -3, -2, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    # Two samples of two points: of the first only the third unit changes, of the second the fourth, since 0 is no sign of 1.
    assert crossed_units(values, 2).tolist() == [1, 1]
    points = polytope_vertices(torch.zeros(1, 1, 1, 2), torch.eye(2), 0.5)
    assert points.flatten(2).tolist() == [[[0.5, 0.0], [0.0, 0.5], [-0.5, 0.0], [0.0, -0.5]]]


def test_half_precision_is_counted_in_float32() -> None:
    torch.manual_seed(0)
    net, x = SmallCNN(width=4).eval().bfloat16(), torch.rand(3, 1, 8, 8)
    twin = SmallCNN(width=4).eval()
    twin.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    )
    ours, theirs = (LocalComplexity(vertices=8, radius=0.01).count(model, x) for model in (net, twin))
    assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}
    assert next(net.parameters()).dtype == torch.bfloat16


def test_looks_are_spaced_by_the_logarithm_of_the_step() -> None:
    monitor = LocalComplexity(per_decade=3)
    due = []
    for step in range(300):
        if monitor.is_due(step):
            due.append(step)
            monitor._looked = step
    assert due == [1, 2, 5, 10, 22, 46, 100, 215]


def fit(folder: Path, epochs: int, *callbacks: LocalComplexity, resume: Path | None = None) -> tuple[Trainer, StandardTraining]:
    torch.manual_seed(0)
    method = StandardTraining(SmallCNN(width=4), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    trainer.fit(method, datamodule=DigitsDataModule(batch_size=32), ckpt_path=resume)
    return trainer, method


def small() -> LocalComplexity:
    return LocalComplexity(samples=6, vertices=4, radius=0.02, per_decade=4)


def test_monitor_changes_nothing_and_resumes(tmp_path: Path) -> None:
    _, plain = fit(tmp_path / "plain", 2)
    monitor = small()
    trainer, watched = fit(tmp_path / "watched", 2, monitor)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))
    assert [entry["step"] for entry in monitor.history] == [0, 1, 2, 3, 6]
    assert list(monitor.history[0]["counts"]) == ["train", "test", "random"]
    assert list(monitor.units) == [f"activation {i}" for i in range(1, 5)] and sum(monitor.units.values()) == 768
    # Test hulls are of test images.
    data = trainer.datamodule
    index = torch.arange(6) * len(data.test_set) // 6
    by_hand = small().count(watched.eval(), data.test_set.read(index, None)[0])
    late = small()
    late._train.read(trainer)
    late._test = data.test_set.read(index, None)[0]
    late.look(trainer, watched)
    assert late.history[0]["counts"]["test"] == {name: c.double().mean().item() for name, c in by_hand.items()}
    record = Record.read(tmp_path / "watched" / "analysis" / "fit" / "localcomplexity.json")
    assert record.lines[0].x == [1, 2, 3, 6] and list(record.lines[0].lines) == ["train", "test", "random"]
    assert record.figures["train_first"] == sum(monitor.history[0]["counts"]["train"].values()) / 768
    assert record.lines[0].lines["train"][-1] == pytest.approx(record.figures["train_last"])

    trainer, _ = fit(tmp_path / "first", 1, first := small())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path / "second", 2, second := small(), resume=tmp_path / "half.ckpt")
    assert first.history == monitor.history[:4] and second.history == monitor.history


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalComplexity(vertices=3), "vertices=3 must be an even number"),
        (lambda: LocalComplexity(radius=0), "radius=0 must be a finite number above 0"),
        (lambda: LocalComplexity(layers=[]), r"layers=\[\] names no layer"),
        (lambda: LocalComplexity(samples=0), "samples=0 must be a whole number"),
        (
            lambda: LocalComplexity().count(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(1, 1, 8, 8)),
            "no activation",
        ),
        (lambda: LocalComplexity(layers=["x"]).count(nn.Sequential(nn.ReLU()), torch.rand(1, 1, 8, 8)), "layers names 'x'"),
        (
            lambda: LocalComplexity().count(nn.Sequential(nn.ReLU()), torch.rand(1, 1, 4, 4)),
            "20 orthogonal directions do not fit",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_compiled_network_is_refused(tmp_path: Path) -> None:
    method = torch.compile(nn.Sequential(nn.Flatten(), nn.ReLU()))
    with pytest.raises(ValueError, match="is compiled, and LocalComplexity cannot look inside"):
        small().count(method, torch.rand(1, 1, 8, 8))
