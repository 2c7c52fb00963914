"""``python -m benchmarks.scale``, small, as a user runs it: what it finds, not how fast it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scale


@pytest.mark.slow
def test_the_sides_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scale, "SIDES", {name: scale.SIDES[name] for name in (scale.ONE, scale.TWO)})
    path = tmp_path / "scale.json"
    small = ["--net", "SmallCNN", "--batch", "8", "--images", "30", "--chunk", "4", "--steps", "1", "--rounds", "1"]
    assert scale.main([*small, "--json", str(path)]) in (0, 1)
    found = json.loads(path.read_text())
    assert found["identical"] and found["allreduce_bytes_s"] > 0
    assert [(point["processes"], point["batch"]) for point in found["points"]] == [(2, 4), (2, 2)]
    said = capsys.readouterr().out
    assert "Predictions and verdicts are the same on all sides" in said and "2 x 1" in said


def test_a_batch_that_cannot_be_shared_out_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--batch", "12"])
    assert "--batch 12 must be a multiple of 8" in capsys.readouterr().err
