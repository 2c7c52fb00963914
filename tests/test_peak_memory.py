"""Peak memory of the training: what validation takes leaves no mark on it, and a figure says what it is one of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from robust_pl.callbacks import ComputeMonitor
from robust_pl.callbacks.checkpoints import LastCheckpoint
from robust_pl.callbacks.monitors import compute, memory
from robust_pl.callbacks.monitors.compute import COST_KEY, not_training
from robust_pl.callbacks.monitors.memory import MIXED, OF_PROCESS, OF_PROCESS_AT_ALL_TIMES, ON_CUDA, PeakMemory, over_runs
from robust_pl.methods import Example, StandardTraining
from robust_pl.report.cost import cost_figures, cost_note, cost_rows

from .conftest import TINY
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process
from .test_monitors import QUIET, loader, sgd, small

MIB = 1 << 20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


class Device:
    """The allocator of a GPU, as far as its statistics go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 100
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(compute, "PeakMemory", lambda device: PeakMemory(torch.device("cuda", 0)))

    def reset(self, device: torch.device) -> None:
        assert device == torch.device("cuda", 0)
        self.peak = self.now

    def take(self, size: int) -> None:
        """So many bytes for a moment."""
        self.peak = max(self.peak, self.now + size)


class Takes(StandardTraining):
    """Takes memory in its loss."""

    def __init__(self, take: Callable[[int], None], sizes: list[int]) -> None:
        super().__init__(small(), optimizer=sgd)
        self.take, self.sizes = take, sizes
        self._checked = {True, False}

    def loss(self, example: Example) -> Tensor:
        self.take(self.sizes[min(self.global_step, len(self.sizes) - 1)])
        return super().loss(example)


class Validates(Callback):
    """Takes memory in validation, and as a monitor that says so after each step."""

    def __init__(self, take: Callable[[int], None], size: int) -> None:
        self.take, self.size = take, size

    def on_validation_batch_end(self, *_: Any) -> None:
        self.take(self.size)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        with not_training(trainer):
            self.take(self.size)


def fit(method: LightningModule, *callbacks: Callback, checkpoint: Path | None = None, epochs: int = 2) -> Trainer:
    settings = {**QUIET, "limit_val_batches": 1.0, "max_epochs": epochs, "num_sanity_val_steps": 1}
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(method, loader(), loader(seed=1), ckpt_path=checkpoint, weights_only=True)
    return trainer


# On CUDA --------------------------------------------------------------------------------------------------------------


def test_validation_does_not_floor_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device, monitor = Device(monkeypatch), ComputeMonitor(show=False)
    fit(Takes(device.take, [10, 10, 40, 20]), Validates(device.take, 5000), monitor)
    assert monitor.cost["peak_memory"] == 140 and monitor.cost["peak_memory_of"] == ON_CUDA


def test_what_stays_from_before_counts_as_long_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device, monitor = Device(monkeypatch), ComputeMonitor(show=False)

    class Grows(Callback):
        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                device.now += 7

    fit(Takes(device.take, [10]), Grows(), monitor, epochs=3)
    assert monitor.cost["peak_memory"] == 100 + 2 * 7 + 10


def test_it_is_read_before_validation_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    device, monitor = Device(monkeypatch), ComputeMonitor(show=False)
    fit(Takes(device.take, [10, 30, 10, 10, 10, 10]), Validates(device.take, 500), monitor)
    assert monitor.cost["peak_memory"] == 130  # of the second step, two resets before the end


def test_writing_checkpoints_is_no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, monitor = Device(monkeypatch), ComputeMonitor(show=False)

    class Large(Takes):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            self.take(5000)
            time.sleep(0.3)

    settings = {**QUIET, "limit_val_batches": 0, "max_epochs": 2, "enable_checkpointing": True}
    Trainer(callbacks=[monitor, LastCheckpoint(tmp_path)], **settings).fit(Large(device.take, [10]), loader())
    assert (tmp_path / "last.ckpt").is_file() and monitor.cost["evaluation_seconds"] > 0.5
    assert monitor.cost["peak_memory"] == 110


def test_it_goes_on_where_a_run_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Device(monkeypatch)
    for first, later, expected in ((50, 20, 150), (20, 50, 150)):
        path, monitor = tmp_path / f"{first}.ckpt", ComputeMonitor(show=False)
        fit(Takes(device.take, [first]), ComputeMonitor(show=False), epochs=1).save_checkpoint(path)
        assert torch.load(path, weights_only=True)[COST_KEY]["peak_memory"] == 100 + first
        fit(Takes(device.take, [later]), monitor, checkpoint=path)
        assert monitor.cost["peak_memory"] == expected
    content = torch.load(path, weights_only=True)
    del content[COST_KEY]["peak_memory"], content[COST_KEY]["peak_memory_of"]
    torch.save(content, path)  # as older versions wrote it
    fit(Takes(device.take, [10]), monitor, checkpoint=path)
    assert monitor.cost["peak_memory"] == 110 and monitor.cost["samples"] == 48


def test_runs_on_two_devices_have_no_peak_of_both() -> None:
    on_cuda = {"peak_memory": 5, "peak_memory_of": ON_CUDA}
    assert over_runs(on_cuda, 7, ON_CUDA) == {"peak_memory": 7, "peak_memory_of": ON_CUDA}
    assert over_runs({}, 7, ON_CUDA) == over_runs({"samples": 1}, 7, ON_CUDA) == {"peak_memory": 7, "peak_memory_of": ON_CUDA}
    mixed = over_runs(on_cuda, 7, OF_PROCESS)
    assert mixed == {"peak_memory": None, "peak_memory_of": MIXED} == over_runs(mixed, 7, ON_CUDA)
    assert over_runs({}, None, None) == {"peak_memory": None, "peak_memory_of": None}


# On a CPU -------------------------------------------------------------------------------------------------------------


def take(size: int) -> None:
    """For a moment, and really: pages that nobody writes to are not resident."""
    torch.ones(size, dtype=torch.uint8)


@pytest.mark.slow
@LINUX
def test_the_process_without_validation() -> None:
    monitor, lighter = ComputeMonitor(show=False), ComputeMonitor(show=False)
    fit(Takes(take, [40 * MIB]), Validates(take, 900 * MIB), lighter, epochs=1)
    fit(Takes(take, [440 * MIB]), Validates(take, 900 * MIB), monitor, epochs=1)
    assert monitor.cost["peak_memory_of"] == OF_PROCESS
    difference = monitor.cost["peak_memory"] - lighter.cost["peak_memory"]
    assert abs(difference - 400 * MIB) < 200 * MIB  # what a process holds beside varies by some 40 MiB


def test_a_system_that_cannot_forget_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    monitor = ComputeMonitor(show=False)
    fit(Takes(take, [MIB]), Validates(take, 300 * MIB), monitor, epochs=1)
    assert monitor.cost["peak_memory_of"] == OF_PROCESS_AT_ALL_TIMES
    assert monitor.cost["peak_memory"] == memory._of_process() > 300 * MIB
    monkeypatch.setattr(memory, "_of_process", lambda: None)
    fit(Takes(take, [MIB]), monitor)
    assert monitor.cost["peak_memory"] is None and monitor.cost["peak_memory_of"] is None


def test_other_devices_tell_nothing() -> None:
    peak = PeakMemory(torch.device("mps"))
    peak.begin()
    peak.read()
    assert peak.peak is None and peak.of is None


# Reports --------------------------------------------------------------------------------------------------------------


def test_figures_rows_and_note() -> None:
    monitor = ComputeMonitor(show=False)
    fit(Takes(take, [MIB]), monitor)
    cost = {**monitor.cost, "seconds": 2.0, "samples": 48, "peak_memory": 3 << 29, "peak_memory_of": ON_CUDA}
    figures = cost_figures(cost)
    assert figures["images_per_second"] == 24.0 and figures["peak_memory"] == 3 << 29
    rows = {line[0]: line[1] for line in cost_rows(cost)}
    assert rows["samples a second"] == "24" and rows["peak memory"] == "1.50 GiB"
    assert cost_note(cost).endswith(f" Peak memory is that of {ON_CUDA}.")
    older = {key: value for key, value in cost.items() if not key.startswith("peak")}
    assert "peak_memory" not in cost_figures(older) and "Peak" not in cost_note(older)
    assert "peak memory" not in {line[0] for line in cost_rows({**older, "seconds": 0.0})}
    assert "images_per_second" not in cost_figures({**older, "seconds": 0.0})


def test_on_the_command_line(robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.init_args.save_dir=log"
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, *logger)
    said = " ".join(capsys.readouterr().out.split())
    assert "peak memory" in said and "samples a second" in said and "Peak memory is that of the whole process" in said
    cost = json.loads(Path("runs/tiny/compute.json").read_text())
    assert cost["peak_memory"] > 50 * MIB and cost["peak_memory_of"].startswith("the whole process")
    columns = next(Path("log").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"cost/peak_memory", "cost/images_per_second"} <= set(columns)
    robust_pl("test", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")
    assert "| peak memory |" in Path("runs/tiny/test/report.md").read_text()


@pytest.mark.slow
def test_of_two_processes_it_is_that_of_the_larger(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "takes.py").write_text(
        "import json, torch\n"
        "from lightning.pytorch import Callback\n"
        "class Takes(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        torch.ones(400 << 20 if trainer.global_rank == 1 else 1, dtype=torch.uint8)\n"
        "    def on_fit_end(self, trainer, *_):\n"
        "        monitor = next(c for c in trainer.callbacks if type(c).__name__ == 'ComputeMonitor')\n"
        "        json.dump(monitor._memory.peak, open(f'rank{trainer.global_rank}.json', 'w'))\n"
    )
    robust_pl_process(tmp_path, "fit", "-c", "tiny.yaml", *DDP, "2", "--trainer.callbacks+=takes.Takes")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    cost = json.loads((tmp_path / "runs/tiny/compute.json").read_text())
    assert second > first + 300 * MIB and cost["peak_memory"] >= second
