"""The pure parts of the benchmark of distillation: what is paired with what, intervals, tables, and what is run again."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from robust_pl.data import DigitsDataModule

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


# Intervals -----------------------------------------------------------------------------------------------------------


def test_interval_over_seeds_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, and t(2 degrees of freedom, 97.5 %) = 4.302653."""
    found = benchmark("paired").over_seeds([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    half = 4.302652729911275 / 3**0.5
    assert (found.ours, found.theirs, found.difference) == pytest.approx((22, 20, 2))
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert found.text() == "+2.0 [-0.5, +4.5]"


def test_a_single_seed_has_no_interval() -> None:
    found = benchmark("paired").over_seeds([3.0], [1.5])
    assert found.difference == 1.5 and np.isnan(found.low) and found.text() == "+1.5"
    with pytest.raises(ValueError, match="2 seeds of one method and 1 of the other"):
        benchmark("paired").over_seeds([1.0, 2.0], [1.0])


def test_figures_over_samples_by_hand() -> None:
    """Class 0 has 3 of 4 and 2 of 4, class 1 has 1 of 2 and 2 of 2."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    ours, theirs = np.array([1, 1, 1, 0, 1, 0]), np.array([1, 1, 0, 0, 1, 1])
    found = benchmark("paired").over_samples(ours, theirs, labels)
    assert (found["accuracy"].ours, found["accuracy"].theirs) == pytest.approx((100 * 4 / 6, 100 * 4 / 6))
    assert (found["worst class"].ours, found["worst class"].theirs) == (50, 50)
    # Means 0.625 and 0.75, population deviations 0.125 and 0.25.
    assert (found["NSD"].ours, found["NSD"].theirs) == pytest.approx((0.2, 1 / 3))
    assert found["NSD"].difference == pytest.approx(0.2 - 1 / 3)
    with pytest.raises(ValueError, match="samples cannot be paired"):
        benchmark("paired").over_samples(ours[:5], theirs, labels)


def test_where_nobody_is_right_there_is_no_nsd() -> None:
    found = benchmark("paired").over_samples(np.array([1, 0, 1]), np.zeros(3), np.array([0, 0, 1]))
    assert np.isnan(found["NSD"].difference) and found["NSD"].text() == "+nan"
    assert found["accuracy"].theirs == 0 and found["worst class"].difference == 50


@pytest.mark.slow
def test_the_bootstrap_is_paired_stratified_and_seeded() -> None:
    paired, draws = benchmark("paired"), np.random.default_rng(0)
    labels = draws.integers(10, size=1797)
    one = draws.random(1797) < 0.7
    for found in paired.over_samples(one, one, labels).values():  # the same resamples for both: nothing is left
        assert (found.difference, found.low, found.high) == (0, 0, 0)
    # Where all of a class fare alike, resamples within classes change nothing; without strata accuracy would move.
    alike = labels < 5
    found = paired.over_samples(alike, ~alike, labels)
    assert found["accuracy"].low == pytest.approx(found["accuracy"].high)
    other = draws.random(1797) < 0.6
    assert paired.over_samples(one, other, labels) == paired.over_samples(one, other, labels)
    assert paired.over_samples(one, other, labels) != paired.over_samples(one, other, labels, seed=1)


def test_the_interval_of_the_accuracy_is_that_of_the_normal_law() -> None:
    """With a single class the stratified bootstrap of a mean difference has the deviation of the differences over sqrt(N)."""
    paired, draws, n = benchmark("paired"), np.random.default_rng(1), 1500
    ours, theirs = draws.random(n) < 0.6, draws.random(n) < 0.5
    found = paired.over_samples(ours, theirs, np.zeros(n, int))["accuracy"]
    each = 100 * (ours.astype(float) - theirs)
    half = 1.959964 * each.std() / n**0.5
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.15)
    assert found.low == pytest.approx(paired.over_samples(ours, theirs, np.zeros(n, int))["worst class"].low)


def test_classes_keep_their_sizes_in_resamples() -> None:
    labels = np.repeat([0, 1], [3, 5])
    drawn = benchmark("paired").resampled(np.stack([labels == 0, np.arange(8) < 4]).astype(float), labels, seed=0, count=200)
    assert drawn.shape == (2, 200, 2)
    assert (drawn[0, :, 0] == 1).all() and (drawn[0, :, 1] == 0).all() and (drawn[1, :, 0] == 1).all()
    assert np.allclose((5 * drawn[1, :, 1]) % 1, 0) and 0.1 < drawn[1, :, 1].mean() < 0.3


# Tables --------------------------------------------------------------------------------------------------------------

TABLE = """index,label,prediction,right_pgd20,linf_pgd20,right_autoattack
0,0,0,1,0.2,1
1,0,0,1,0.2,0
2,1,1,0,0.2,0
3,1,0,0,0.2,0
"""
COST = {
    "samples": 100,
    "networks": {
        "net": {"training": {"forwards": 900, "input_backwards": 700, "weight_backwards": 200}},
        "teacher": {"training": {"forwards": 100, "input_backwards": 0, "weight_backwards": 0}},
        "clean_teacher": {"training": {"forwards": 150, "input_backwards": 50, "weight_backwards": 0}},
    },
    "flops": 2e12,
    "seconds": 12.5,
}


def test_figures_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text(TABLE)
    verdicts = benchmark("paired").Verdicts.read(tmp_path / "predictions.csv")
    found = benchmark("distillation").figures([verdicts], COST)
    expected = {"clean": 75, "pgd20": 50, "autoattack": 25, "mean_pgd20": 62.5, "mean_autoattack": 50}
    expected |= {"worst_clean": 50, "worst_pgd20": 0, "worst_autoattack": 0}
    expected |= {"nsd_clean": 1 / 3, "nsd_pgd20": 1, "nsd_autoattack": 1}
    expected |= {"cost_forwards": 9, "cost_backwards": 9, "cost_teacher_forwards": 2.5, "cost_teacher_backwards": 0.5}
    assert found == pytest.approx(expected | {"cost_tflop": 2, "cost_seconds": 12.5})


def test_a_second_trial_has_its_own_images(tmp_path: Path) -> None:
    """Clean accuracy is that of the first; the mean with AutoAttack that of AutoAttack's own images."""
    first, second = (tmp_path / name for name in ("a.csv", "b.csv"))
    first.write_text("index,label,prediction,right_pgd20\n0,0,0,1\n1,0,1,0\n2,0,0,0\n3,0,0,0\n")
    second.write_text("index,label,prediction,right_autoattack\n0,0,0,1\n1,0,1,0\n")
    read = benchmark("paired").Verdicts.read
    found = benchmark("distillation").figures([read(first), read(second)], COST)
    assert (found["clean"], found["mean_pgd20"], found["mean_autoattack"]) == (75, 50, 50)


def row(**changes: float) -> dict[str, float]:
    module = benchmark("distillation")
    return {**dict.fromkeys(module.COLUMNS, 50.0), **{f"cost_{key}": 1.0 for key in module.COSTS}, **changes}


def test_pairs_are_of_the_same_seeds_and_the_table_has_every_row() -> None:
    module = benchmark("distillation")
    rows = {"rslad": [row(mean_pgd20=80), row(mean_pgd20=70)], "mtard": [row(mean_pgd20=83), row(mean_pgd20=71)]}
    found = module.pairs(rows)
    assert list(found) == [
        "MTARD against RSLAD, mean of clean and PGD-20",
        "MTARD against RSLAD, mean of clean and AutoAttack",
    ]
    assert found["MTARD against RSLAD, mean of clean and PGD-20"]["seeds"] == [3, 1]
    assert found["MTARD against RSLAD, mean of clean and PGD-20"]["over_seeds"].difference == 2
    head, body = module.lines(rows)
    text = benchmark("runs").markdown(head, body)
    assert [line[0] for line in body] == ["RSLAD", "MTARD"] and text.count("\n") == 4
    assert "| 75.0 ± 7.1 |" in text and len({line.count("|") for line in text.splitlines()}) == 1


# Folds ---------------------------------------------------------------------------------------------------------------


def fold_verdicts(shift: int = 0) -> list[Any]:
    """A sample is right if its position among all digits, plus ``shift``, is even."""
    tests = []
    for fold in range(5):
        data = DigitsDataModule(fold=fold)
        index = np.arange(len(data.test_set))
        right = (data.positions[1].numpy() + shift) % 2 == 0
        tests.append(benchmark("paired").Verdicts(index, data.test_set.labels.numpy(), {"clean": right, "pgd20": ~right}))
    return tests


def test_folds_come_together_sample_by_sample() -> None:
    folds = benchmark("folds")
    once = folds.pooled(fold_verdicts(), 5)
    assert (once.right["clean"] == (np.arange(1797) % 2 == 0)).all() and len(once.labels) == 1797
    twice = folds.pooled(fold_verdicts() + fold_verdicts(shift=1), 5)
    assert (twice.right["clean"] == 0.5).all() and (twice.labels == once.labels).all()
    tests = fold_verdicts()
    with pytest.raises(ValueError, match="the test of fold 1 was of other digits"):
        folds.pooled([tests[0], *tests[:4]], 5)
    text, numbers = folds.report(once, twice, ["ABSLD", "RSLAD"])
    assert numbers["samples"] == 1797 and numbers["verdicts"]["pgd20"]["figures"]["worst class"]["theirs"] == 50
    assert "| PGD-20, worst class |" in text and "| clean, ABSLD |" in text
    json.dumps(numbers)


# Runs ----------------------------------------------------------------------------------------------------------------

CONFIG = "# needs: robust-pl fit -c base.yaml --run.name first --x 1\nmodel: {class_path: A}\n"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that would have been run; they leave what a run and a test leave."""
    runs, commands = benchmark("runs"), []
    (tmp_path / "student.yaml").write_text(CONFIG)
    (tmp_path / "base.yaml").write_text("model: {class_path: B}\n")

    def run(self: Any, log: str, arguments: list[str]) -> None:
        commands.append(log)
        if log.endswith(".fit"):
            where = self.folder / "runs" / log.removesuffix(".fit")
            where.mkdir(parents=True)
            (where / "compute.json").write_text("{}")
        else:
            output = Path(arguments[arguments.index("--evaluation.output_dir") + 1])
            for folder in (output, output.with_name(output.name + "-ema")):
                folder.mkdir(parents=True)
                (folder / "figures.json").write_text(json.dumps({"acc_clean": 0.5}))

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs.Runs, "_run", run)
    return commands


def test_what_is_done_is_not_run_again_and_what_has_changed_is(tmp_path: Path, asked: list[str]) -> None:
    runs = benchmark("runs").Runs(tmp_path / "seed0", 0)

    def everything() -> list[str]:
        made_by = runs.fit("robust-pl fit -c student.yaml")
        result = runs.test("student", made_by, ("strong", {"pgd": {"class_path": "PGD"}}))
        assert set(result["figures"]) == {"raw", "ema"}
        done = list(asked)
        asked.clear()
        return done

    assert everything() == ["first.fit", "student.fit", "student-strong.test"]
    assert everything() == []
    (tmp_path / "student.yaml").write_text(CONFIG.replace("# needs", "# Measured: 1 %\n# needs"))
    assert everything() == []
    (tmp_path / "student.yaml").write_text(CONFIG.replace("A}", "C}"))
    assert everything() == ["student.fit", "student-strong.test"]
    (tmp_path / "base.yaml").write_text("model: {class_path: D}\n")
    assert everything() == ["first.fit", "student.fit", "student-strong.test"]
    runs.fit("robust-pl fit -c student.yaml --run.name student")  # the same, said in full
    assert asked == []
    shutil.rmtree(tmp_path / "seed0" / "tests")
    assert everything() == ["student-strong.test"]


def test_options_and_seed_reach_every_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    runs, whole = benchmark("runs"), []
    monkeypatch.setattr(runs.Runs, "_run", lambda self, log, arguments: whole.append(list(arguments)))
    runs.Runs(tmp_path / "fold3", 7, ("--data.init_args.fold", "3")).fit("robust-pl fit -c student.yaml")
    assert len(whole) == 2
    for arguments in whole:
        assert arguments[arguments.index("--data.init_args.fold") + 1] == "3"
        assert arguments[arguments.index("--seed_everything") + 1] == "7"
    assert whole[0][-2:] == ["--run.name", "first"] and "--x" in whole[0]


def test_a_failure_leaves_out_what_has_not_begun() -> None:
    begun = []

    def fails() -> None:
        raise SystemExit("broken")

    with pytest.raises(SystemExit, match="broken"):
        benchmark("runs").at_once([fails, *(lambda i=i: begun.append(i) for i in range(500))], 1)
    assert len(begun) < 500
    assert benchmark("runs").at_once([lambda i=i: i for i in range(5)], 2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nothing"], "'nothing' has no config configs/digits/nothing.yaml"),
        (["--folds", "--set", "cifar10"], "--folds are those of the digits"),
        (["--folds", "--methods", "pgd_at"], "--folds compares two methods, not 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark("distillation").main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_how_sure_a_network_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = benchmark("teachers")

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])

    # Probabilities (3/4, 1/4) and (1/2, 1/2); the second sample's label is 1, and argmax takes the first of equals.
    said = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    expected = ["50.0", f"{(0.75 + 0.5) / 2:.2f}", f"{(said + math.log(2)) / 2:.2f}"]
    assert teachers.row(Fixed(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])) == expected
    with pytest.raises(SystemExit):
        teachers.main(["--runs", str(tmp_path)])
    assert "has no run 'teacher_robust'" in capsys.readouterr().err


def test_a_figure_that_some_seed_lacks() -> None:
    spread = benchmark("runs").spread
    assert spread([1.0, float("nan"), 2.0]) == spread([float("nan")]) == "none"
    assert spread([1.0, 2.0]) == "1.5 ± 0.7" and spread([1.0]) == "1.0"
