"""The benchmark of the start-up runs and reports what it promises. Times are never asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.startup")


def test_each_round_asks_every_command_and_begins_with_another(startup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(startup, "cpu_seconds", lambda name: asked.append(name) or float(len(asked)))
    rounds = startup.measure(["help", "version"], 2)
    assert asked == ["bare", "help", "version", "help", "version", "bare", "version", "bare", "help"]
    assert rounds.seconds == {"bare": [6.0, 8.0], "help": [4.0, 9.0], "version": [5.0, 7.0]}
    assert rounds.figures("bare")["help"]["ratio_median"] == pytest.approx((4 / 6 + 9 / 8) / 2)


def test_a_process_is_timed_and_must_end_as_it_should(startup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    work = "-c|sum(range(10 ** 7)); raise SystemExit(3)"
    monkeypatch.setitem(startup.COMMANDS, "help", ("counting", work, 3))
    monkeypatch.setitem(startup.COMMANDS, "version", ("nothing", "-S|-c|raise SystemExit(3)", 3))
    assert startup.cpu_seconds("help") > startup.cpu_seconds("version") > 0
    monkeypatch.setitem(startup.COMMANDS, "help", ("counting", "-c|raise SystemExit('no')", 3))
    with pytest.raises(RuntimeError, match="counting ended with 1 and not 3: no"):
        startup.cpu_seconds("help")


@pytest.mark.slow
def test_it_reports_every_command_and_its_ratio(tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    names = ["version", "help", "no_arguments", "print_config"]
    command = ["-m", "benchmarks.startup", "--rounds", "1", "--json", str(file), "--only", *names]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["settings"] == {"rounds": 1, "only": names} and report["limit"] == 1.5
    assert list(report["commands"]) == ["bare", *names]
    bare = report["commands"]["bare"]["seconds"][0]
    for name, figures in report["commands"].items():
        assert len(figures["seconds"]) == 1 and figures["seconds"][0] > 0, name
        assert figures["ratio_median"] == pytest.approx(figures["seconds"][0] / bare)
    assert "robust-pl --help" in done.stdout and "(at most 1.5)" in done.stdout
