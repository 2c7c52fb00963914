"""A run that was stopped and resumed ends with the same weights, bit for bit, as one that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robust_pl.callbacks.checkpoints import LastCheckpoint

LAST = "checkpoints/last.ckpt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("method", ["PGDAT", "TRADES", "StandardTraining"])
def test_resumed_at_the_end_of_an_epoch(robust_pl: Callable[..., None], tiny: Path, method: str) -> None:
    common = ("fit", "-c", tiny, "--model", method, "--trainer.max_epochs", 3)
    robust_pl(*common, "--run.name", "whole")
    # Stopping is a matter of time, not of max_epochs: the schedule must know the length of the whole run.
    robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    assert torch.load(f"runs/stopped/{LAST}", weights_only=True)["epoch"] == 0
    robust_pl(*common, "--ckpt_path", f"runs/stopped/{LAST}")
    assert_same_weights(Path("runs/whole", LAST), Path("runs/stopped", LAST))


def test_resumed_where_the_last_epochs_were_not_saved_but_the_end(robust_pl: Callable[..., None], tiny: Path) -> None:
    short = ("--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 1, "--run.save_every_n_epochs", 5)
    schedule = ("--model.init_args.schedule", "MultiStep", "--model.init_args.schedule.init_args.milestones", "[1, 2]")
    common = ("fit", "-c", tiny, *short, *schedule)
    robust_pl(*common, "--run.name", "whole", "--trainer.max_epochs", 3)
    robust_pl(*common, "--run.name", "stopped", "--trainer.max_epochs", 2)
    assert torch.load(f"runs/stopped/{LAST}", weights_only=True)["global_step"] == 6
    robust_pl(*common, "--ckpt_path", f"runs/stopped/{LAST}", "--trainer.max_epochs", 3)
    assert_same_weights(Path("runs/whole", LAST), Path("runs/stopped", LAST))


@pytest.mark.parametrize(("field", "given"), [("save_every_n_steps", (0, 1)), ("save_every_n_epochs", (None, 0))])
def test_never_is_not_how_often_a_checkpoint_is_saved(tmp_path: Path, field: str, given: tuple[int | None, int]) -> None:
    with pytest.raises(ValueError, match=f"run.{field}=0 must be at least 1"):
        LastCheckpoint(tmp_path, *given)


def test_resumed_in_the_middle_of_an_epoch_with_dropout(robust_pl: Callable[..., None], tiny: Path) -> None:
    Path("droppednet.py").write_text(
        "from torch import nn\n"
        "from robust_pl.nets import SmallCNN\n"
        "class Dropped(nn.Sequential):\n"
        "    def __init__(self, num_classes: int = 10):\n"
        "        super().__init__(nn.Dropout(0.1), SmallCNN(num_classes, width=4), nn.Identity())\n"
    )
    common = ("fit", "-c", tiny, "--model.init_args.net", "droppednet.Dropped", "--run.save_every_n_steps", 3)
    robust_pl(*common, "--run.name", "whole")
    with pytest.raises(RuntimeError, match="crash"):
        robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.CrashAfterBatch")
    saved = torch.load(f"runs/stopped/{LAST}", weights_only=True)
    assert saved["global_step"] % 11, "the checkpoint must lie inside an epoch"
    robust_pl(*common, "--ckpt_path", f"runs/stopped/{LAST}", "--run.name", "resumed")
    assert_same_weights(Path("runs/whole", LAST), Path("runs/resumed", LAST))


def test_best_stays_the_best_in_a_moved_folder(robust_pl: Callable[..., None], tiny: Path) -> None:
    ruin = ("--model.init_args.schedule", "null", "--trainer.callbacks+=tests.stopper.Ruin")
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--run.name", "a", *ruin[:2])
    before = weights(Path("runs/a/checkpoints/best.ckpt"))
    Path("runs/a").rename("runs/moved")
    robust_pl("fit", "-c", tiny, "--ckpt_path", "runs/moved/checkpoints/last.ckpt", "--trainer.max_epochs", 2, *ruin)
    after = weights(Path("runs/moved/checkpoints/best.ckpt"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_resumed_after_kill_minus_nine(tiny: Path) -> None:
    def start(name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "robust_pl", "fit", "-c", str(tiny), "--run.name", name]
        command += ["--run.save_every_n_steps", "2", "--trainer.max_epochs", "6", *more]
        return subprocess.Popen(command, cwd=tiny.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start("whole")
    assert whole.wait(300) == 0, whole.stderr and whole.stderr.read()
    killed = start("killed")
    last = tiny.parent / "runs" / "killed" / LAST
    while not last.is_file() or torch.load(last, weights_only=True)["global_step"] < 14:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert torch.load(last, weights_only=True)["global_step"] < 60
    resumed = start("killed", "--ckpt_path", str(last))
    assert resumed.wait(300) == 0, resumed.stderr and resumed.stderr.read()
    assert_same_weights(tiny.parent / "runs" / "whole" / LAST, last)
