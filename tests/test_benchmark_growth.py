"""The benchmark of growth: fits find the exponent, each point is measured once, all that is promised is written. No times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = "--net SmallCNN --steps 1 2 --batch 2 4 --classes 3 10 --size 8 16 --base-batch 2 --base-steps 1 --base-size 8 --pairs 1"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # would hold for all tests
    return importlib.import_module("benchmarks.growth")


def test_a_power_law_is_found(growth: ModuleType) -> None:
    found = growth.fit([32, 64, 128], [3 * 32**2, 3 * 64**2, 3 * 128**2])
    assert found["exponent"] == pytest.approx(2) and found["c"] == pytest.approx(3) and found["error"] < 1e-6
    assert growth.fit([32], [1.0]) is None


def test_the_base_is_measured_once(growth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measure(point: Any, *_: Any) -> dict[str, Any]:
        seen.append(point)
        seconds = [float(point.batch * point.size**2)]
        return {work: growth.Pairs(work, 1, seconds, [2 * s for s in seconds]) for work in growth.WORK}

    monkeypatch.setattr(growth, "measure", measure)
    base = growth.Point(steps=5, batch=16, classes=10, size=32)
    found = growth.grow(base, {"batch": [8, 16, 32], "size": [32, 64]}, "SmallCNN", 1, torch.device("cpu"))
    assert len(seen) == len(set(seen)) == 4 and base in seen
    assert found["batch"]["attack"]["fit"]["ours"]["exponent"] == pytest.approx(1)
    assert found["size"]["training"]["fit"]["lean"]["exponent"] == pytest.approx(2)
    assert [at["ratio_median"] for at in found["batch"]["training"]["at"]] == [0.5, 0.5, 0.5]


def test_table_plot_and_json(growth: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    growth.main([*TINY.split(), "--json", str(file), "--plot", str(plot)])
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(report) == {"settings", "machine", "axes"} and list(report["axes"]) == ["steps", "batch", "classes", "size"]
    assert report["axes"]["size"]["values"] == [8, 16]
    for axis in report["axes"].values():
        for work in ("attack", "training"):
            assert len(axis[work]["at"]) == 2 and set(axis[work]["fit"]) == {"ours", "lean"}
            assert all(len(at["ours_s"]) == len(at["lean_s"]) == 1 and at["ours_s"][0] > 0 for at in axis[work]["at"])
    assert said.count("exponent") == 4 and "training step, ours" in said and "height and width" in said
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("wrong", ["--size 64 32", "--steps 0 1", "--pairs 0", "--base-batch 0", "--axes colour"])
def test_wrong_arguments(growth: ModuleType, wrong: str) -> None:
    with pytest.raises(SystemExit):
        growth.main(wrong.split())
