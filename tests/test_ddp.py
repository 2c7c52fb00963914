"""Two processes: equal weights, other training starts, and figures that do not depend on how many there are."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import TINY

DDP = ("--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--trainer.devices")
PROBE = """
import torch
from lightning.pytorch import Callback
from robust_pl.data import DigitsDataModule

class Probe(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rank = trainer.global_rank
        x = torch.full((1, 1, 8, 8), 0.5)
        draws = pl_module.attack._draws(None, rank, torch.device("cpu"))
        torch.save({"weights": pl_module.state_dict(), "draw": draws.uniform(x), "index": batch[2]}, f"rank{rank}.pt")

class StopAfterEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True

class Ninetyseven(DigitsDataModule):
    def load_test(self):
        images = super().load_test()
        images.images, images.labels = images.images[:97], images.labels[:97]
        return images
"""


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "robust_pl", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def test_97_samples_over_two_processes_equal_one(folder: Path) -> None:
    """Needs batches that do not divide the set, and one rank with fewer of them."""
    common = ("test", "-c", "tiny.yaml", "--data", "probe.Ninetyseven", "--data.init_args.eval_batch_size", "10")
    logger = "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger"
    for name, ddp in (("one", ()), ("two", (*DDP, "2"))):
        run(folder, *common, *ddp, "--run.name", name, logger, f"--trainer.logger.init_args.save_dir={name}")
    tables = [(folder / "runs" / name / "test" / "predictions.csv").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 98
    figures = []
    for name in ("one", "two"):
        with next((folder / name).rglob("metrics.csv")).open(newline="") as file:
            row = next(iter(csv.DictReader(file)))
        figures.append({key: value for key, value in row.items() if "seconds" not in key and "loss" not in key})
    assert figures[0] == figures[1] and "test/acc_worst" in figures[0] and "test/fair_pgd" in figures[0]
    stored = [json.loads((folder / "runs" / name / "test" / "figures.json").read_text()) for name in ("one", "two")]
    stored = [{key: value for key, value in found.items() if "seconds" not in key} for found in stored]
    assert stored[0] == stored[1] and "class_acc_pgd/3" in stored[0] and "nsd_clean" in stored[0]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["200", "50"])
def test_validation_while_fitting_equals_one_process(folder: Path, chunk: str) -> None:
    """144 validation samples: with chunks of 200 one rank has no batch, with chunks of 50 it has one and the other two."""
    logger = ("--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger",)
    fit = ("fit", "-c", "tiny.yaml", *DDP, "2", "--trainer.max_epochs", "2", "--data.init_args.eval_batch_size", chunk)
    run(folder, *fit, *logger, "--trainer.logger.init_args.save_dir=fit", "--run.name", "fit")
    again = ("validate", "--ckpt_path", "runs/fit/checkpoints/last.ckpt", "-c", "tiny.yaml")
    run(folder, *again, *logger, "--trainer.logger.init_args.save_dir=validate")
    figures = []
    for name in ("fit", "validate"):
        with next((folder / name).rglob("metrics.csv")).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val/acc_worst"]]
        figures.append({key: value for key, value in rows[-1].items() if "val/" in key and "acc" in key})
    assert figures[0] == figures[1] and "val/acc_pgd" in figures[0]


@pytest.mark.slow
def test_fit_keeps_the_ranks_together_and_resumes(folder: Path) -> None:
    common = ("fit", "-c", "tiny.yaml", *DDP, "2", "--data.init_args.batch_size", "64")
    probe = ("--trainer.callbacks+=probe.Probe",)
    run(folder, *common, *probe, "--run.name", "whole")
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first["weights"].items():
        if "running" not in name:  # BatchNorm's statistics are those of each rank until the next step
            assert torch.equal(value, second["weights"][name]), name
    assert not torch.equal(first["draw"], second["draw"])
    assert not set(first["index"].tolist()) & set(second["index"].tolist())

    run(folder, *common, "--run.name", "part", "--trainer.callbacks+=probe.StopAfterEpoch")
    run(folder, *common, "--ckpt_path", "runs/part/checkpoints/last.ckpt")
    whole, resumed = (
        torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "part")
    )
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name

    tables = []
    for devices in ("1", "2"):  # into folders of their own: the second would otherwise read what the first has finished
        where = ("--evaluation.output_dir", f"test-{devices}")
        run(folder, "test", "--ckpt_path", "runs/part/checkpoints/best.ckpt", "-c", "tiny.yaml", *DDP, devices, *where)
        tables.append((folder / f"test-{devices}" / "predictions.csv").read_bytes())
    assert tables[0] == tables[1]
