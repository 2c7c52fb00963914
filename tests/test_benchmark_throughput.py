"""The benchmark of training throughput, small: its table and figures."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import throughput
from robust_pl import nets


def setting(attack_steps=2):
    shape = (3, 16, 16)
    return throughput.Setting(lambda: nets.SmallCNN(in_channels=3, width=8), shape, 10, 4, attack_steps, 2, torch.device("cpu"))


def test_the_work_of_an_image_is_counted():
    """One more attack step is one more forward and one more backward pass to the pixels; none is a usual training step."""
    none, one, two = (throughput.flops(setting(steps)) for steps in range(3))
    assert two - one == one - none > 0
    conv = 2 * 8 * 3 * 9 * 16 * 16  # the first layer alone: multiplications and sums
    assert none > 2 * conv


@pytest.mark.slow
def test_rows_and_profile(tmp_path, capsys):
    file = tmp_path / "throughput.json"
    options = "--device cpu --net SmallCNN --size 16 --batch-sizes 4 --steps 2 --attack-steps 1 --rows lean default"
    throughput.main([*options.split(), "--profile", str(tmp_path), "--json", str(file)])
    report = json.loads(file.read_text())
    assert [row["row"] for row in report["rows"]] == ["hand-written loop, float32", "defaults, float32"]
    for row in report["rows"]:
        assert row["images_s"] == pytest.approx(4 / row["step_s"])
        assert row["share_of_matrix_rate"] == pytest.approx(row["tflops"] / row["matrix_tflops"])
    assert "convolution" in (tmp_path / "default_4.txt").read_text()
    shown = capsys.readouterr().out
    assert "PGD-1 training, SmallCNN" in shown and "matrix rate" in shown
