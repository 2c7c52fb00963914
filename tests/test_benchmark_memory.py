"""The benchmark of memory: what a step takes is found, and both sides are measured in processes of their own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # would hold for all tests
    return importlib.import_module("benchmarks.memory")


def train(watched: Iterator[Any], sizes: list[int]) -> None:
    """Take so many MiB for a moment in each step, and really: pages that nobody writes to are not resident."""
    for _, size in zip(watched, sizes, strict=True):
        torch.ones(size * MIB, dtype=torch.uint8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_the_measured_steps_alone(memory: ModuleType) -> None:
    watched = memory.Watched((torch.zeros(1), torch.zeros(1)), warm_up=1, measured=2)
    train(iter(watched), [700, 150, 300])
    figures = watched.figures()
    assert 280 * MIB < figures["step"] < 400 * MIB  # not the 700 before, and the larger of the two
    assert figures["peak"] == figures["before"] + figures["step"] and "whole process" in figures["of"]


def test_a_system_that_tells_no_peak_is_refused(memory: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("robust_pl.callbacks.monitors.memory._CLEAR", tmp_path / "no" / "such")
    watched = memory.Watched((torch.zeros(1), torch.zeros(1)), 1, 1)
    train(iter(watched), [1, 1])
    with pytest.raises(SystemExit, match="measure on Linux, or on CUDA"):
        watched.figures()


def test_table_json_and_ratios(
    memory: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    found = {"ours": {"before": 300 * MIB, "step": 210 * MIB}, "lean": {"before": 200 * MIB, "step": 200 * MIB}}

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert env["MALLOC_MMAP_THRESHOLD_"] == "65536"
        commands.append(command)
        side = found[command[-1]]
        said = json.dumps({**side, "peak": side["before"] + side["step"], "of": "the process"})
        return subprocess.CompletedProcess(command, 0, f"something else\n{said}\n")

    monkeypatch.setattr(memory.subprocess, "run", run)
    file = tmp_path / "memory.json"
    memory.main(["--batch-size", "7", "--warm-up", "1", "--json", str(file)])
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(report) == {"settings", "machine", "ours", "lean", "ratio"}
    assert report["ratio"] == {"step": 1.05, "peak": 510 / 400, "before": 1.5}
    assert [command[-1] for command in commands] == ["ours", "lean"]
    assert all(command[3:5] == ["--batch-size", "7"] and "--json" not in command for command in commands)
    assert "step: 1.050 times that of lean (with the defaults at most 1.05)" in said and "measured: the process" in said


@pytest.mark.parametrize("wrong", ["--measured 0", "--warm-up 0", "--side theirs"])
def test_wrong_arguments(memory: ModuleType, wrong: str) -> None:
    with pytest.raises(SystemExit):
        memory.main(wrong.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    command = "--net SmallCNN --batch-size 16 --steps 1 --warm-up 1 --measured 1 --threads 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *command.split(), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    for side in ("ours", "lean"):
        assert 0 < report[side]["step"] < report[side]["before"] and report[side]["peak"] > 100 * MIB
    # The plain loop's process does not import Lightning, which takes some 100 MiB.
    assert report["ours"]["before"] > report["lean"]["before"] + 30 * MIB
