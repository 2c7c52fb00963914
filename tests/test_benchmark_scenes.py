"""The benchmark of renderers runs, names what is left out, and reports what it promises. Times are never asserted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_it_reports_each_renderer_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("mitsuba", "pyrender"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # would hold for all tests
    scenes = importlib.import_module("benchmarks.scenes")
    file = tmp_path / "scenes.json"
    scenes.main(["--sizes", "16", "24", "--poses", "2", "--rounds", "3", "--subdivisions", "1", "--json", str(file)])
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert report["faces"] == 80 and report["settings"]["sizes"] == [16, 24]
    assert {(row["renderer"], row["size"]) for row in report["rows"]} >= {("rasterizer", 16), ("rasterizer", 24)}
    assert not any("mitsuba" in row["renderer"] or "pyrender" in row["renderer"] for row in report["rows"])
    assert all(len(row["cpu_ms"]) == 3 and row["cpu_ms_best"] <= row["cpu_ms_median"] for row in report["rows"])
    assert "pyrender is left out: PyrenderRenderer needs pyrender" in said and "frames/s" in said
    with pytest.raises(SystemExit):
        scenes.main(["--poses", "0"])
