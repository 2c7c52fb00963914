"""The benchmark of renderers runs, names what is left out, and reports what it promises. Times are never asserted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import MeshRasterizer

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
    scenes.ball(8).save(tmp_path / "mine.ckpt")
    arguments = ["--sizes", "16", "24", "--poses", "2", "--rounds", "3", "--subdivisions", "1"]
    scenes.main([*arguments, "--field", str(tmp_path / "mine.ckpt"), "--json", str(file)])
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert report["faces"] == 80 and report["settings"]["sizes"] == [16, 24]
    assert {(row["renderer"], row["size"]) for row in report["rows"]} >= {
        (name, size) for name in ("rasterizer", scenes.FIELD, "mine") for size in (16, 24)
    }
    assert not any("mitsuba" in row["renderer"] or "pyrender" in row["renderer"] for row in report["rows"])
    assert all(len(row["cpu_ms"]) == 3 and row["cpu_ms_best"] <= row["cpu_ms_median"] for row in report["rows"])
    assert "pyrender is left out: PyrenderRenderer needs pyrender" in said and "frames/s" in said
    with pytest.raises(SystemExit):
        scenes.main(["--poses", "0"])


def test_the_field_that_is_measured_is_the_sphere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    scenes = importlib.import_module("benchmarks.scenes")
    pose = camera_to_world(torch.tensor([[0.0, 30, 60, 4, 0, 0]]))
    ball, mesh = (
        scenes.ball(48).render(pose),
        MeshRasterizer(scenes.sphere(3), (48, 48), ambient=1.0, directional=0.0).render(pose),
    )
    assert (ball.alpha - mesh.alpha).abs().mean() < 0.02
    covered = (mesh.alpha * (ball.alpha > 0.99)).expand(-1, 3, -1, -1) == 1
    assert np.corrcoef(ball.rgb[covered], mesh.rgb[covered])[0, 1] > 0.95
