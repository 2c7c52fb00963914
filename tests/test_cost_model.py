"""The model of what a step costs, against hand calculations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cost_model import Device, Link, Measured, Work, cost, fit, images_a_second, main, memory

WORK = Work(batch=10, attack_steps=10, parameters=1_000_000, activations=5e6, states=2)
DEVICE, LINK = Device(unit_s=1e-3, step_s=0.02), Link(1e9)


def test_a_step_on_one_process() -> None:
    found = cost(WORK, 1, DEVICE, LINK)
    assert WORK.units == 23  # 2 for each of ten attack steps, and 3
    assert found.seconds == pytest.approx(0.23 + 0.02) and found.sent == found.shown_s == found.hidden_s == 0
    assert found.memory == pytest.approx(4 * 4e6 + 5e7)  # weights, gradients and two states; activations of ten images
    assert images_a_second(WORK, 1, found) == pytest.approx(40)


def test_an_all_reduce_sends_twice_the_share_of_the_others_and_hides_behind_the_backward_pass() -> None:
    found = cost(WORK, 4, DEVICE, LINK)
    assert found.sent == pytest.approx(2 * 3 / 4 * 4e6)
    assert found.hidden_s + found.shown_s == pytest.approx(6e-3)  # 6 MB at 1 GB/s; all of it is in the last bucket
    assert found.shown_s == pytest.approx(6e-3) and found.memory == pytest.approx(5 * 4e6 + 5e7)
    large = Work(10, 10, parameters=100_000_000)
    found = cost(large, 2, DEVICE, LINK)
    assert found.shown_s == pytest.approx(0.4 - 0.02)  # 400 MB; a backward pass of 2 units and 10 images hides 20 ms
    assert cost(large, 2, DEVICE, Link(1e12)).shown_s == pytest.approx(4e-4 * 25e6 / 400e6)  # the last bucket


def test_sharding_saves_memory_and_a_gather_each_pass_sends_more() -> None:
    ddp, step, each = (cost(WORK, 8, DEVICE, LINK, strategy) for strategy in ("ddp", "sharded step", "sharded pass"))
    assert step.sent == pytest.approx(ddp.sent) and each.sent == pytest.approx(23 / 2 * ddp.sent)
    assert memory(WORK, 8, "sharded step") == pytest.approx((4 / 8 + 1) * 4e6 + 5e7)
    assert each.memory < step.memory < ddp.memory


def test_processes_beyond_the_devices_take_turns() -> None:
    two = Device(1e-3, 0.02, devices=2)
    quick = Link(1e15)
    assert cost(WORK, 2, two, quick).seconds == pytest.approx(0.25)
    assert cost(WORK, 4, two, quick).seconds == pytest.approx(0.5)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    link = Link(100e9, hop_s=1e-5, inside=8, outside_s=10e9)
    assert link.ring_s(8e9, 8, 1) == pytest.approx(7 * (1e9 / 100e9 + 1e-5))
    assert link.ring_s(16e9, 16, 2) == pytest.approx(2 * 15 * (1e9 / 10e9 + 1e-5))
    assert link.ring_s(8e9, 1, 2) == 0


def test_the_fit_finds_what_made_the_figures() -> None:
    true = Device(2.5e-3, 0.07, devices=2)
    works = [(Work(batch, 10, 1_000_000), processes) for batch in (8, 16, 32) for processes in (1, 2, 4)]
    points = [Measured(work, processes, cost(work, processes, true, LINK).seconds) for work, processes in works]
    found, errors = fit(points, LINK, devices=2)
    assert found.unit_s == pytest.approx(true.unit_s, rel=1e-3) and found.step_s == pytest.approx(true.step_s, rel=1e-2)
    assert max(map(abs, errors)) < 1e-3
    _, errors = fit([*points, Measured(works[0][0], 1, 10.0)], LINK, devices=2)
    assert min(errors) < -0.5  # one that the model cannot explain
    with pytest.raises(ValueError, match="1 measured steps do not tell"):
        fit(points[:1], LINK, 2)
    negative = [Measured(Work(b, 1, 10), 1, s) for b, s in ((1, 1e-9), (10, 1.0))]
    assert fit(negative, LINK, 1)[0].step_s == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"processes": p, "batch": 8, "seconds": s} for p, s in ((1, 2.0), (2, 2.1), (4, 4.1))]
    measured = {"steps": 10, "parameters": 10_000_000, "points": points, "allreduce_bytes_s": 1e9, "cores": 2}
    path = tmp_path / "scale.json"
    path.write_text(json.dumps(measured))
    monkeypatch.setattr(sys, "argv", ["cost_model", "--measured", str(path), "--images_s", "1000", "--gpus", "1", "64"])
    monkeypatch.setenv("COLUMNS", "120")
    main()
    said = capsys.readouterr().out
    assert "2.000" in said and "+" in said and "sharded pass" in said and "100.0%" in said
