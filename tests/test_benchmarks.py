"""The benchmarks run and report what they promise. Times are never asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.timing")


def test_pairs_alternate_and_the_warm_up_is_not_counted(timing):
    calls = []
    pairs = timing.compare("x", 3, ours=lambda: calls.append("o"), lean=lambda: calls.append("l"))
    assert "".join(calls) == "ol" + "lo" + "ol" + "lo"
    assert len(pairs.ours) == len(pairs.lean) == 3


def test_ratios_are_taken_between_neighbours(timing):
    pairs = timing.Pairs("x", 3, ours=[2.0, 3.0, 8.0], lean=[1.0, 2.0, 2.0])
    summary = pairs.summary()
    assert pairs.ratios() == [2.0, 1.5, 4.0]
    assert (summary["ratio_min"], summary["ratio_median"], summary["ratio_max"]) == (1.5, 2.0, 4.0)
    assert (summary["ours_median_s"], summary["lean_median_s"]) == (3.0, 2.0)


@pytest.mark.slow
def test_callbacks_report_a_ratio_each(tmp_path):
    file = tmp_path / "callbacks.json"
    command = "--net SmallCNN --batch-size 8 --steps 2 --pairs 2 --threads 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.callbacks", *command.split(), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert len(report["EMA"]["ours_s"]) == len(report["EMA"]["lean_s"]) == 2
    assert "with the defaults at most 1.02" in done.stdout


@pytest.mark.slow
def test_overhead_reports_both_ratios(tmp_path):
    file = tmp_path / "overhead.json"
    command = "--net SmallCNN --batch-size 8 --steps 2 --pairs 2 --threads 1 --json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", *command.split(), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert set(report) == {"settings", "machine", "difference", "attack", "training_step"}
    assert report["settings"] == {"pairs": 2, "batch_size": 8, "steps": 2, "threads": 1, "net": "SmallCNN"}
    assert report["machine"]["threads"] == 1
    assert all(value <= 1e-6 for value in report["difference"].values()), report["difference"]
    for name, label in (("attack", "PGD-2 attack"), ("training_step", "PGD-2 training step")):
        part = report[name]
        assert part["what"] == label and label in done.stdout
        assert len(part["ours_s"]) == len(part["lean_s"]) == 2
        assert all(seconds > 0 for seconds in part["ours_s"] + part["lean_s"])
        assert 0 < part["ratio_min"] <= part["ratio_median"] <= part["ratio_max"]


@pytest.mark.slow
def test_autoattack_measures_ours_alone_where_the_official_package_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "autoattack.json"
    monkeypatch.delenv("ROBUST_PL_DATA", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.autoattack", "--samples", "12", "--only", "undefended", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "is not installed: ours is measured alone" in done.stdout
    figures = json.loads(file.read_text())["digits, undefended"]
    assert figures["samples"] == 12 and figures["ours"]["robust"] == []
    assert figures["ours"]["forwards"] < 12 * 101
    assert len(figures["ours"]["seconds"]) == 1
