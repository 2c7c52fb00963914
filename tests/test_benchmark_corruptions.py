"""The benchmark of corruptions and the sheet of them. Times are never asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.functional.corruptions import BENCHMARK, corrupt


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("benchmarks.corruptions")


def test_it_reports_each_corruption_and_their_sum(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "corruptions.json"
    benchmark.main(
        ["--random", "--images", "3", "--batch-size", "2", "--threads", "1", "--net", "SmallCNN", "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert list(found["seconds"]) == list(BENCHMARK)
    assert found["corruptions"]["cpu"] == pytest.approx(sum(one["cpu"] for one in found["seconds"].values()))
    assert found["net"]["wall"] > 0
    assert "with the defaults less than 60 s" in capsys.readouterr().out


def test_a_sheet_shows_severities_side_by_side(benchmark: ModuleType, tmp_path: Path) -> None:
    sheets = importlib.import_module("benchmarks.corruption_sheet")
    image = Image.fromarray(np.arange(40 * 32 * 3, dtype=np.uint8).reshape(32, 40, 3))
    image.save(tmp_path / "image.png")
    sheets.main([str(tmp_path / "sheet.png"), str(tmp_path / "image.png"), "--size", "32", "--cell", "32"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (16 + 19 * 36, 124 + 6 * 36, 3)
    x = sheets.read(tmp_path / "image.png", 32)
    row, column = list(BENCHMARK).index("contrast"), 4  # as it is, and severities 1 to 4
    made = corrupt(x.unsqueeze(0), "contrast", 4, torch.zeros(1, dtype=torch.int64))[0]
    shown = sheet[16 + row * 36 :, 124 + column * 36 :][:32, :32]
    assert (shown == (made * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).all()
    with pytest.raises(SystemExit):
        sheets.main([str(tmp_path / "sheet.png"), "--size", "2"])
