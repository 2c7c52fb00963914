"""Effective robustness: the line between logits, and tables of shifts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robust_pl.metrics.effective_robustness import (
    SHIFTS,
    Baseline,
    ShiftRow,
    accuracy_drop,
    shift_rows,
    standard_baseline,
    standard_pairs,
)
from robust_pl.report.shift_table import shift_record


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_a_line_is_found_again() -> None:
    pairs = [(sigmoid(z), sigmoid(0.8 * z - 0.5)) for z in (-1.0, 0.2, 1.0, 3.0)]
    line = Baseline.fit([*pairs, (0.9, 0.0), (1.0, 0.7)])
    assert (line.slope, line.intercept) == pytest.approx((0.8, -0.5)) and line.models == 4
    assert line.deviation == pytest.approx(0, abs=1e-9)
    assert line.expected(0.5) == pytest.approx(sigmoid(-0.5))
    assert line.effective(0.5, 0.5) == pytest.approx(0.5 - sigmoid(-0.5))
    assert line.expected(0.0) == 0 and line.expected(1.0) == 1


def test_least_squares_by_hand() -> None:
    x, y = [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]  # slope 1/2, intercept 1/2
    line = Baseline.fit([(sigmoid(a), sigmoid(b)) for a, b in zip(x, y, strict=True)])
    assert (line.slope, line.intercept) == pytest.approx((0.5, 0.5))
    residual = [sigmoid(b) - sigmoid(0.5 * a + 0.5) for a, b in zip(x, y, strict=True)]
    assert line.deviation == pytest.approx(np.sqrt(np.mean(np.square(residual))))


def test_published_networks_lie_near_their_lines() -> None:
    for shift in SHIFTS:
        pairs = standard_pairs(shift)
        assert len(pairs) == 69 and all(0 <= value <= 1 for pair in pairs.values() for value in pair)
        baseline = standard_baseline(shift)
        assert baseline.slope > 0.5 and baseline.models >= 68
        effective = [baseline.effective(*pair) for pair in pairs.values()]
        assert abs(np.mean(effective)) < 0.02
    assert standard_pairs("imagenet_v2")["resnet50"] == pytest.approx((0.7613, 0.6321))
    assert standard_pairs("imagenet_a")["resnet50"][1] == 0 and standard_baseline("imagenet_a").models == 68
    assert standard_baseline("imagenet_v2").deviation < 0.01 < 0.03 < standard_baseline("imagenet_a").deviation
    # Less accurate there than without the shift, by about 12 points.
    assert 0.10 < 0.76 - standard_baseline("imagenet_v2").expected(0.76) < 0.14


def test_rows_and_record() -> None:
    line = Baseline(1.0, -1.0, 9, 0.0)
    rows = shift_rows({"mine": (0.5, 0.4), "other": (0.8, 0.6)}, {"mine": line})
    assert rows[0].effective == pytest.approx(0.4 - sigmoid(-1)) and rows[0].drop == pytest.approx(0.1)
    assert rows[1] == ShiftRow("other", 0.8, 0.6) and rows[1].effective is None
    record = shift_record(rows)
    assert record.figures == pytest.approx({"accuracy": 0.5, "effective": 0.4 - sigmoid(-1)})
    assert record.sheets[0].rows[1] == ["other", 0.8, 0.6, pytest.approx(0.2), None, None]
    (row,) = shift_rows({"imagenet_v2": (0.7613, 0.6321)})
    assert row.effective == pytest.approx(standard_baseline("imagenet_v2").effective(0.7613, 0.6321))
    assert not shift_record([rows[1]]).notes


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"acc_id=76\.1 is no accuracy: give a share in \[0, 1\], not per cent"):
        Baseline.fit([(76.1, 63.2), (0.5, 0.5)])
    with pytest.raises(ValueError, match=r"1 pairs .* fit no line: give at least two networks that differ"):
        Baseline.fit([(0.5, 0.4), (0.6, 0.0)])
    with pytest.raises(ValueError, match="2 pairs"):
        Baseline.fit([(0.5, 0.4), (0.5, 0.3)])
    with pytest.raises(ValueError, match="shift='imagenet_c' is unknown: choose one of imagenet_v2"):
        standard_pairs("imagenet_c")
    with pytest.raises(ValueError, match=r"acc_edited=1\.2"):
        accuracy_drop(0.9, 1.2)
    with pytest.raises(ValueError, match=r"acc_ood=nan"):
        shift_rows({"mine": (0.5, math.nan)})
    with pytest.raises(ValueError, match="there is no shift"):
        shift_record([])
