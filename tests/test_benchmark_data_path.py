"""The benchmark of the data path runs and reports every path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_path_is_reported(tmp_path):
    pytest.importorskip("webdataset")
    command = "--images 500 --photographs 8 --batch 8 --workers 1 --rounds 1 --out"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.data_path", *command.split(), tmp_path / "a.json"],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    assert set(figures["small"]["paths"]) == {"copy on the device", "0 workers", "1 workers"}
    ways = {"files, pillow", "shards, pillow"}
    assert set(figures["photographs"]["paths"]) >= {f"{way}, {number} workers" for way in ways for number in (0, 1)}
    for name, count in (("small", 500), ("photographs", 8)):
        for side, found in figures[name]["paths"].items():
            assert found["images_per_second"] == pytest.approx(count / found["seconds"][0])
            assert side in done.stdout
    assert "cpu" in figures["machine"]
    assert {"decode by pillow", "8 bits to float32"} < set(figures["photograph_cpu_ms"])
