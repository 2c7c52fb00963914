"""The benchmark of training against viewpoints, at a size of seconds, and the configs that it compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.view_attacks import attacks
from benchmarks.viewpoints import TRAININGS, lines

ROOT = Path(__file__).parents[1]


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs/views" / f"{name}.yaml").read_text())


def test_the_compared_trainings_differ_in_the_views_alone() -> None:
    standard = config("standard")
    rendering = [config(name) for name in TRAININGS if name != "standard"]
    for other in rendering:
        assert {k: v for k, v in other.items() if k != "model"} == {k: v for k, v in standard.items() if k != "model"}
        for part in ("net", "optimizer", "schedule"):
            assert other["model"]["init_args"][part] == standard["model"]["init_args"][part]
    assert len({other["model"]["init_args"]["renders"] for other in rendering}) == 1


def test_searches_of_a_pair_render_as_much() -> None:
    tested = attacks(51, 25, 100)
    assert tested["search 1"].samples == tested["middle"].popsize * tested["middle"].iterations
    assert tested["viewfool"].begin == tested["gmvfool"].begin == "search"
    assert tested["viewfool"].iterations == tested["gmvfool"].iterations == 15
    gmvfool = tested["spread"]
    assert tested["search 5"].samples == (gmvfool.popsize + gmvfool.components - 1) * gmvfool.iterations
    assert tested["search 5"].keep == gmvfool.components and tested["search 1"].keep == 1


def test_too_few_iterations_are_one_line() -> None:
    with pytest.raises(ValueError, match="iterations=10 must be at least 11"):
        attacks(51, 10, 100)


def test_a_table_by_hand() -> None:
    result = {
        "figures": {"clean": {"acc": 0.9, "worst_loss": 1.5}, "gmvfool": {"acc": 0.5, "worst_loss": 3.0}},
        "seconds": 10.0,
    }
    other = {"figures": {"clean": {"acc": 0.8, "worst_loss": 2.5}, "gmvfool": {"acc": 0.3, "worst_loss": 4.0}}, "seconds": 20.0}
    head, body = lines({"viat": [result, other]}, "acc")
    assert head == ["training", "clean", "gmvfool", "seconds"] and body == [["viat", "85.0 ± 7.1", "40.0 ± 14.1", "15"]]
    assert lines({"viat": [result]}, "worst_loss")[1] == [["viat", "1.50", "3.00", "10"]]


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on(tmp_path: Path) -> None:
    small = ["train_objects=2", "views_per_object=7", "val_objects=1", "image_size=16"]
    fit = [f"--data.init_args.{size}" for size in small] + ["--trainer.max_epochs=5", "--model.init_args.renders=4"]
    sizes = ["--popsize", "11", "--iterations", "11", "--samples", "5", "--seeds", "0", "--trainings", "viat", "natural"]
    command = [sys.executable, "-m", "benchmarks.viewpoints", *sizes, "--output", str(tmp_path), "--options", *fit]
    first, again = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr[-3000:] + first.stdout[-3000:]
    assert "viat.fit:" in first.stdout and "viat.test:" in first.stdout
    assert "fit:" not in again.stdout and "test:" not in again.stdout
    report = json.loads((tmp_path / "viewpoints.json").read_text())
    figures = report["rows"]["viat"][0]["figures"]
    assert list(figures) == ["clean", "random", "search 1", "viewfool", "middle", "search 5", "gmvfool", "spread"]
    assert figures["search 1"]["renders"] == figures["viewfool"]["renders"] == figures["middle"]["renders"]
    assert figures["search 5"]["renders"] == figures["spread"]["renders"] > figures["gmvfool"]["renders"]
    assert (tmp_path / "viewpoints.md").read_text().count("| viat |") == 3
