"""An analysis survives a kill: what it saw of a batch lies beside the store until the test is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import PGD, Analysis, RobustEvaluation, RobustnessCurve
from robust_pl.callbacks.analysis.seen import Seen, SeenFiles
from robust_pl.data import DigitsDataModule
from robust_pl.nets import SmallCNN
from robust_pl.report import Record

from .conftest import TINY
from .test_ddp import DDP

BATCH = 60
SAMPLES = 330  # of 360: the last batch is looked at in part


class Classes(Analysis):
    """Accuracy, and the sum of all pixels; it writes down where it looked."""

    def __init__(self, samples: int | None = SAMPLES, scale: float = 1.0, name: str | None = None) -> None:
        super().__init__(samples, name)
        self.scale = scale
        self.looked: list[int] = []

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        self.looked += index.tolist()
        for part in (slice(0, 20), slice(20, None)):  # one name, several times a batch
            self.keep(right=self.ask(model, self.scale * x[part]).argmax(1) == y[part])
        self.add(pixels=(self.scale * x).sum((0, 2, 3)))

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        figures = {"right": kept["right"].double().mean().item(), "pixels": sums["pixels"].sum().item()}
        return Record("Classes", self.name, "Classes", {**figures, "order": kept["index"].diff().eq(1).all().item()})


class Net(LightningModule):
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = SmallCNN(width=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Killed(Callback):
    """Ends the process, as far as a test can, at the end of a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            raise RuntimeError("killed")


def run(
    folder: Path, analyses: list[Analysis], order: str = "analysis first", killed_at: int | None = None, data: Any = None
) -> list[Any]:
    """A test of the digits, and what it found; ``killed_at`` ends it between the first callback and the second."""
    evaluation, attack = RobustEvaluation(output_dir=str(folder / "test")), PGD(0.1, steps=1)
    attack.name = "pgd"
    kill = [] if killed_at is None else [Killed(killed_at)]
    callbacks = [*analyses, *kill, evaluation] if order == "analysis first" else [evaluation, *kill, *analyses]
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[attack, *callbacks],
    )
    data = DigitsDataModule(batch_size=BATCH) if data is None else data
    if killed_at is None:
        trainer.test(Net(), data, verbose=False)
        return [analysis.record for analysis in analyses]
    with pytest.raises(RuntimeError, match="killed"):
        trainer.test(Net(), data, verbose=False)
    return []


def without_time(record: Record) -> dict[str, Any]:
    found = json.loads(record.as_json())
    found["about"].pop("seconds")
    return found


@pytest.mark.parametrize("order", ["analysis first", "evaluation first"])
def test_after_a_kill_no_batch_is_looked_at_twice(order: str, tmp_path: Path) -> None:
    (whole,) = run(tmp_path / "whole", [Classes()], order)
    assert whole.figures["order"] and whole.about["samples"] == SAMPLES and whole.about["forwards_per_sample"] == 1
    first, second, third = Classes(), Classes(), Classes()
    run(tmp_path / "cut", [first], order, killed_at=1)
    run(tmp_path / "cut", [second], order, killed_at=2)
    (found,) = run(tmp_path / "cut", [third], order)
    assert without_time(found) == without_time(whole)
    looked = first.looked + second.looked + third.looked
    assert sorted(looked) == list(range(SAMPLES)) and first.looked and second.looked and third.looked
    assert not (tmp_path / "cut/test/parts").exists()  # and the store is as if nothing had happened
    names = [{path.name for path in (tmp_path / run_ / "test").rglob("*") if path.is_file()} for run_ in ("whole", "cut")]
    assert names[0] == names[1]


def test_other_settings_and_other_names_see_for_themselves(tmp_path: Path) -> None:
    run(tmp_path, [Classes(), Classes(name="other")], killed_at=2)
    same, brighter, fewer, other = Classes(), Classes(scale=2.0), Classes(samples=100), Classes(name="other")
    same_record, brighter_record, fewer_record, _ = run(tmp_path, [same, brighter, fewer, other])
    assert min(same.looked) == min(other.looked) == 3 * BATCH
    assert sorted(brighter.looked) == list(range(SAMPLES)) and sorted(fewer.looked) == list(range(100))
    assert brighter_record.figures["pixels"] == pytest.approx(2 * same_record.figures["pixels"])
    assert fewer_record.about["samples"] == 100


def test_one_that_is_added_to_a_finished_test_looks_at_all(tmp_path: Path) -> None:
    run(tmp_path, [])
    added = Classes()
    (found,) = run(tmp_path, [added])
    assert sorted(added.looked) == list(range(SAMPLES)) and found.about["samples"] == SAMPLES


def test_a_curve_goes_on_where_it_was(tmp_path: Path) -> None:
    def curve() -> RobustnessCurve:
        return RobustnessCurve(PGD(steps=2), eps=[0.05, 0.1], samples=150)

    (whole,) = run(tmp_path / "whole", [curve()])
    run(tmp_path / "cut", [curve()], killed_at=1)
    resumed = curve()
    (found,) = run(tmp_path / "cut", [resumed])
    assert without_time(found) == without_time(whole)
    assert resumed.attack.samples == 2 * 30  # of the last batch alone, at two radii


def test_a_users_own_loader_shows_finished_batches_again(tmp_path: Path) -> None:
    x, y = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    loader = DataLoader(TensorDataset(x, y, torch.arange(10)), batch_size=4)
    run(tmp_path, [Classes()], killed_at=1, data=loader)
    again = Classes()
    (found,) = run(tmp_path, [again], data=loader)
    assert again.looked == list(range(10)) and found.about["samples"] == 10


def test_what_was_seen_comes_back_from_its_file(tmp_path: Path) -> None:
    files = SeenFiles(tmp_path, "curve", {"eps": [0.1]})
    kept = {"right": [torch.tensor([[True], [False]]), torch.tensor([[True]])], "index": [torch.arange(3)]}
    files.write(128, Seen(kept, {"sum": torch.tensor(0.1, dtype=torch.float64)}, 7, 1.5))
    assert files.found() == [128] and SeenFiles(tmp_path, "curve", {"eps": [0.2]}).found() == []
    both = Seen({"index": [torch.tensor([9])]}, {"sum": torch.tensor(1.0).double(), "more": torch.ones(2)}, 1, 0.5)
    both.include(files.read(128))
    assert torch.cat(both.kept["index"]).tolist() == [9, 0, 1, 2] and both.kept["right"][0].tolist() == [
        [True],
        [False],
        [True],
    ]
    assert both.sums["sum"].item() == 1.1 and both.sums["more"].tolist() == [1, 1]
    assert (both.forwards, both.seconds) == (8, 2.0)
    path = next(tmp_path.rglob("00000128.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete this one file"):
        files.read(128)


@pytest.mark.slow
def test_killed_from_outside_and_finished_by_two_processes(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    common = ("test", "-c", "tiny.yaml", "--data.init_args.eval_batch_size", "30", "--report.flags", "0")
    silent = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}

    def into(name: str) -> list[str]:
        settings = f"{{attack: {{class_path: PGD, init_args: {{steps: 20}}}}, eps: [0.05, 0.1], folder: {name}}}"
        curve = ("--trainer.callbacks", f"[{{class_path: RobustnessCurve, init_args: {settings}}}]")
        return [sys.executable, "-m", "robust_pl", *common, *curve, "--evaluation.output_dir", f"{name}-test"]

    subprocess.run(into("whole"), check=True, **silent)
    with subprocess.Popen(into("killed"), **silent) as process:
        parts = tmp_path / "killed-test/parts/analysis"
        while process.poll() is None and len(list(parts.rglob("*.safetensors"))) < 4:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert 4 <= len(list(parts.rglob("*.safetensors"))) < 12
    subprocess.run([*into("killed"), *DDP, "2"], check=True, **silent)
    curves = [(tmp_path / name / "robustness_curve.json").read_bytes() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert not parts.exists()
