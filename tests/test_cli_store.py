"""The store as a user of the command line meets it: stopped, started again, checked."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robust_pl.callbacks import PGD

from .conftest import TINY
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process

CLI = Callable[..., None]
BEST = "runs/tiny/checkpoints/best.ckpt"
SMALL = ("--data.init_args.eval_batch_size", "60")


@pytest.fixture
def trained(robust_pl: CLI, tiny: Path) -> Path:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    return tiny


def test_the_same_command_again_reads_what_is_there(
    robust_pl: CLI, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    robust_pl("test", "--ckpt_path", BEST, *SMALL)
    before = Path("runs/tiny/test/predictions.csv").read_bytes()
    first = capsys.readouterr().out

    def perturb(self: PGD, problem: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(PGD, "perturb", perturb)
        robust_pl("test", "--ckpt_path", BEST, *SMALL)
    again = capsys.readouterr().out
    rows = [line for line in first.splitlines() if line.startswith("│")]
    assert rows and rows == [line for line in again.splitlines() if line.startswith("│")]
    assert Path("runs/tiny/test/predictions.csv").read_bytes() == before
    # With other settings it is another evaluation.
    robust_pl("test", "--ckpt_path", BEST, *SMALL, "--attacks.pgd.init_args.steps", 2)
    assert Path("runs/tiny/test-2/predictions.csv").is_file()
    assert Path("runs/tiny/test/predictions.csv").read_bytes() == before


@pytest.mark.parametrize("limit", ["2", "0.5"])
def test_stopped_in_the_middle_it_goes_on(robust_pl: CLI, trained: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    command = ("test", "--ckpt_path", BEST, *SMALL, "--trainer.limit_test_batches", limit)
    real, calls = PGD.perturb, []

    def stops(self: PGD, problem: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, problem, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(PGD, "perturb", stops)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            robust_pl(*command)
    assert [path.name for path in Path("runs/tiny/test/shards").iterdir()] == ["00000000.safetensors"]
    calls += [0]  # so that nothing stops any more
    monkeypatch.setattr(PGD, "perturb", stops)
    robust_pl(*command)
    batches = 2 if limit == "2" else 3
    assert sum(calls[3:]) == 60 * (batches - 1)
    robust_pl(*command, "--run.output_dir", "elsewhere", "--evaluation.output_dir", "whole")
    for name in ("predictions.csv",):
        table = Path("runs/tiny/test", name).read_bytes()
        assert table == Path("whole", name).read_bytes() and table.count(b"\n") == 1 + 60 * batches


def test_a_test_without_a_checkpoint_goes_on_in_its_own_run(robust_pl: CLI, tiny: Path) -> None:
    for _ in range(2):
        robust_pl("test", "-c", tiny)
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    robust_pl("test", "-c", tiny, "--seed_everything", 1)  # other weights
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-2"]


def test_the_report_lies_beside_the_table(robust_pl: CLI, trained: Path) -> None:
    robust_pl("fit", "-c", trained, "--trainer.max_epochs", 12, "--run.name", "better")
    sweep = [f"--attacks.pgd_{i}={{class_path: PGD, init_args: {{eps: {i}/50, steps: 2}}}}" for i in (2, 4)]
    robust_pl("test", "--ckpt_path", "runs/better/checkpoints/best.ckpt", *sweep, "--report.flags", 20)
    folder = Path("runs/better/test")
    text = (folder / "report.md").read_text()
    for picture in ("accuracy", "worst_images_of_pgd", "robustness_curve"):
        assert f"images/{picture}.png" in text and (folder / f"images/{picture}.png").stat().st_size > 1000
    assert "raised" in text and "zero_gradient" in text
    assert len(json.loads((folder / "flags.json").read_text())["flags"]) >= 8
    assert json.loads((folder / "robustbench.json").read_text())["clean_acc"]


# Audit ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_audit_in_a_fresh_process_passes_and_finds_a_changed_byte(robust_pl: CLI, trained: Path) -> None:
    robust_pl("test", "--ckpt_path", BEST, *SMALL)

    def audited() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "robust_pl", "audit", "runs/tiny"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = audited()
    assert done.returncode == 0, done.stderr
    assert "audit of runs/tiny/test: passed" in done.stdout and "pgd: in the ball" in done.stdout
    shard = Path("runs/tiny/test/shards/00000120.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    done = audited()
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "shards/00000120.safetensors is not the file that was written" in done.stdout


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_audit_turns_the_network_into_the_precision_of_the_evaluation(robust_pl: CLI, trained: Path, precision: str) -> None:
    robust_pl("test", "--ckpt_path", BEST, "--trainer.precision", precision, "--trainer.limit_test_batches", 1)
    robust_pl("audit", "runs/tiny")


def test_audit_finds_the_checkpoint_from_an_evaluation_elsewhere(
    robust_pl: CLI, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robust_pl("test", "--ckpt_path", BEST, "--evaluation.output_dir", "elsewhere/mine")
    robust_pl("audit", "elsewhere/mine")
    Path("far/from/here").mkdir(parents=True)
    Path("elsewhere/mine").rename("far/from/here/mine")
    assert "--ckpt_path" in complaint(robust_pl, capsys, "audit", "far/from/here/mine")
    robust_pl("audit", "far/from/here/mine", "--ckpt_path", BEST)


@pytest.mark.slow
def test_attacks_among_the_trainers_callbacks_are_part_of_what_was_asked(robust_pl: CLI, trained: Path) -> None:
    for steps in (1, 4, 1):
        callback = f"{{class_path: robust_pl.callbacks.PGD, init_args: {{eps: 0.1, steps: {steps}}}}}"
        robust_pl("test", "-c", trained, "--attacks", "{}", "--trainer.callbacks", f"[{callback}]", "--ckpt_path", BEST)
    assert sorted(path.parent.name for path in Path("runs/tiny").glob("*/store.json")) == ["test", "test-2"]
    robust_pl("test", "--ckpt_path", BEST, "--trainer.fast_dev_run", "true")
    robust_pl("test", "--ckpt_path", BEST)
    assert len(list(Path("runs/tiny").glob("*/store.json"))) == 4


@pytest.mark.slow
def test_other_numbers_of_samples_for_the_flags_are_computed(robust_pl: CLI, trained: Path) -> None:
    robust_pl("fit", "-c", trained, "--trainer.max_epochs", 12, "--run.name", "better")
    best = "runs/better/checkpoints/best.ckpt"
    for count, there in ((20, 20), (30, 30), (None, 30)):
        robust_pl("test", "--ckpt_path", best, *(("--report.flags", count) if count else ()))
        assert json.loads(Path("runs/better/test/flags.json").read_text())["samples"] == there
    robust_pl("test", "--ckpt_path", best, "--report.flags", 0)
    assert not Path("runs/better/test/flags.json").exists()
    robust_pl("audit", "runs/better")


def complaint(robust_pl: CLI, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        robust_pl(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_what_audit_refuses_in_one_line(robust_pl: CLI, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in complaint(robust_pl, capsys, "audit", "nowhere")
    assert "holds no evaluation" in complaint(robust_pl, capsys, "audit", "runs/tiny")
    assert "run" in complaint(robust_pl, capsys, "audit")
    robust_pl("test", "--ckpt_path", BEST)
    Path(BEST).rename("moved.ckpt")
    Path("runs/tiny/checkpoints/last.ckpt").unlink()
    assert "put it back" in complaint(robust_pl, capsys, "audit", "runs/tiny")
    Path("moved.ckpt").rename(BEST)
    store = Path("runs/tiny/test/store.json")
    about = json.loads(store.read_text())
    about["request"]["model"]["class_path"] = "os.system"
    store.write_text(json.dumps(about))
    assert "os.system" in complaint(robust_pl, capsys, "audit", "runs/tiny")


def test_a_store_of_another_model_is_refused(robust_pl: CLI, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("test", "--ckpt_path", BEST, "--evaluation.output_dir", "mine")
    before = Path("mine/predictions.csv").read_bytes()
    robust_pl("fit", "-c", trained, "--trainer.max_epochs", 1, "--seed_everything", 3)
    said = complaint(
        robust_pl, capsys, "test", "--ckpt_path", "runs/tiny-2/checkpoints/best.ckpt", "--evaluation.output_dir", "mine"
    )
    assert "mine holds another evaluation" in said and "output_dir" in said
    assert Path("mine/predictions.csv").read_bytes() == before


# Killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_from_outside_and_finished_by_two_processes(tmp_path: Path) -> None:
    """kill -9 on the command line itself; what one process began, two end, with the table of one that was left alone."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    attack = "--attacks={aa: {class_path: AutoAttack, init_args: {eps: 0.05, version: custom, attacks: [apgd-ce, square]}}}"
    common = ("test", "-c", "tiny.yaml", "--data.init_args.eval_batch_size", "30", "--report.flags", "0", attack)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    robust_pl_process(tmp_path, *common, "--evaluation.output_dir", "whole")
    moments = random.Random(1)
    for _ in range(3):
        command = [sys.executable, "-m", "robust_pl", *common, "--evaluation.output_dir", "killed"]
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            shards = tmp_path / "killed/shards"
            there = len(list(shards.glob("*"))) if shards.exists() else 0
            while process.poll() is None and len(list(shards.glob("*"))) <= there:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
    found = len(list(shards.glob("*.safetensors")))
    assert 3 <= found < 12
    robust_pl_process(tmp_path, *common, "--evaluation.output_dir", "killed", *DDP, "2")
    assert (tmp_path / "killed/predictions.csv").read_bytes() == (tmp_path / "whole/predictions.csv").read_bytes()


def test_the_evaluation_of_another_version_is_left_alone(robust_pl: CLI, trained: Path) -> None:
    old = Path("runs/tiny/test/store.json")
    old.parent.mkdir()
    old.write_text('{"format": 1}')
    robust_pl("test", "--ckpt_path", BEST)
    assert Path("runs/tiny/test-2/predictions.csv").is_file()
    assert old.read_text() == '{"format": 1}'
