"""The benchmark of fast adversarial training: what is run, resumed, chosen and compared. See also test_fast_at_configs.py."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import runs as runs_module
from benchmarks.fast_at import main, rows_of
from benchmarks.fast_at_curves import best_epoch, chosen_weights, collapse, curves, seen, training_cost, validation
from benchmarks.fast_at_plot import plot
from benchmarks.fast_at_table import against_published, published, ranked, table
from benchmarks.runs import Runs, alone

ROOT = Path(__file__).parents[1]


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run; a fit leaves a last checkpoint, and is killed while there is a file ``kill``."""
    commands: list[list[str]] = []
    (tmp_path / "base.yaml").write_text("model: {class_path: A}\n")
    (tmp_path / "method.yaml").write_text("model: {class_path: B}\n")

    def run(self: Any, log: str, arguments: list[str]) -> None:
        commands.append(list(arguments))
        if "fit" in arguments:
            where = self.folder / "runs" / "method"
            (where / "checkpoints").mkdir(parents=True, exist_ok=True)
            (where / "checkpoints" / "last.ckpt").touch()
            (where / "compute.json").write_text("{}")
            if (tmp_path / "kill").exists():
                raise SystemExit("killed")
        else:
            output = Path(arguments[arguments.index("--evaluation.output_dir") + 1])
            output.mkdir(parents=True)
            (output / "figures.json").write_text(json.dumps({"acc_clean": 0.5}))

    monkeypatch.setattr(runs_module, "ROOT", tmp_path)
    monkeypatch.setattr(Runs, "_run", run)
    return commands


COMMAND = "robust-pl fit -c base.yaml -c method.yaml --run.name method"


def test_a_run_of_several_configs(tmp_path: Path, asked: list[list[str]]) -> None:
    runs = Runs(tmp_path / "seed3", 3, ("--x", "1"))
    runs.fit(COMMAND)
    files = ["-c", str(tmp_path / "base.yaml"), "-c", str(tmp_path / "method.yaml")]
    tail = ["--seed_everything", "3", "--x", "1", "--run.name", "method"]
    assert asked == [["-m", "robust_pl", "fit", *files, *tail]]
    runs.fit(COMMAND)
    assert len(asked) == 1
    for name in ("base", "method"):  # whichever has changed
        (tmp_path / f"{name}.yaml").write_text("model: {class_path: C}\n")
        runs.fit(COMMAND)
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, asked: list[list[str]]) -> None:
    runs, kill = Runs(tmp_path / "seed0", 0), tmp_path / "kill"
    kill.touch()
    with pytest.raises(SystemExit, match="killed"):
        runs.fit(COMMAND)
    with pytest.raises(SystemExit, match="killed"):
        Runs(tmp_path / "seed0", 0).fit(COMMAND)
    kill.unlink()
    runs.fit(COMMAND)
    runs.fit(COMMAND)
    last = str(tmp_path / "seed0" / "runs" / "method" / "checkpoints" / "last.ckpt")
    assert [command[2:4] for command in asked] == [["fit", "-c"], ["fit", "--ckpt_path"], ["fit", "--ckpt_path"]]
    assert asked[1] == asked[2] == ["-m", "robust_pl", "fit", "--ckpt_path", last]


def test_a_killed_run_begins_anew_where_its_config_has_changed(tmp_path: Path, asked: list[list[str]]) -> None:
    runs, kill = Runs(tmp_path / "seed0", 0), tmp_path / "kill"
    kill.touch()
    with pytest.raises(SystemExit):
        runs.fit(COMMAND)
    kill.unlink()
    mark = tmp_path / "seed0" / "runs" / "method" / "old"
    mark.touch()
    (tmp_path / "method.yaml").write_text("model: {class_path: C}\n")
    runs.fit(COMMAND)
    assert [command[3] for command in asked] == ["-c", "-c"] and not mark.exists()


def test_weights_that_are_tested_alone(tmp_path: Path, asked: list[list[str]]) -> None:
    runs = Runs(tmp_path / "seed0", 0)
    made_by = runs.fit(COMMAND)
    where, attacks = tmp_path / "seed0" / "runs" / "method", ("pgd", {"pgd": {"class_path": "PGD"}})
    assert runs.test("method", made_by, attacks, weights="ema")["figures"] == {"ema": {"acc_clean": 0.5}}
    assert runs.test("method", made_by, attacks, "last", weights="raw")["figures"] == {"raw": {"acc_clean": 0.5}}
    averaged, raw = asked[1:]
    assert averaged[averaged.index("--model.init_args.weights") + 1] == f"{where}/checkpoints/best.ckpt#ema"
    assert "--ckpt_path" not in averaged and raw[raw.index("--ckpt_path") + 1] == f"{where}/checkpoints/last.ckpt"
    # Behind the run's config, which says otherwise.
    assert raw.index("--evaluation.averages") > raw.index(str(where / "config.yaml"))


def test_what_a_killed_benchmark_left_running_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.lock"
    with alone(path):
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], close_fds=False)
    began = time.perf_counter()
    with alone(path):
        assert orphan.poll() is not None or time.perf_counter() - began > 0.5
    assert "Waiting for what another benchmark started" in capfd.readouterr().out
    orphan.wait()


# What a run's records say ---------------------------------------------------------------------------------------------


def records(folder: Path, versions: list[str]) -> Path:
    for number, text in enumerate(versions):
        (folder / "metrics" / f"version_{number}").mkdir(parents=True)
        (folder / "metrics" / f"version_{number}" / "metrics.csv").write_text(text)
    return folder


def test_curves_of_a_resumed_run(tmp_path: Path) -> None:
    first = (
        "epoch,step,train/loss,val/acc_pgd10,val_ema/acc_pgd10,monitor/co_events\n0,1,2.0,,,\n0,2,,0.2,0.1,0\n1,4,,0.3,0.2,1\n"
    )
    second = "epoch,step,val/acc_pgd10,val_ema/acc_pgd10,monitor/co_events\n1,4,0.31,0.21,0\n2,6,0.25,0.4,2\n"
    found = curves(records(tmp_path, [first, second]))
    assert found["val/acc_pgd10"] == {0: 0.2, 1: 0.31, 2: 0.25} and "train/loss" not in found
    assert found["val_ema/acc_pgd10"] == {0: 0.1, 1: 0.21, 2: 0.4}
    assert seen(found) == 2
    assert validation(found, "ema", 1) == {"val_best": 21, "val_last": 40}
    assert validation(found, "raw", 1) == {"val_best": 31, "val_last": 25}


def test_versions_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    texts = [f"epoch,val/acc_pgd10\n0,0.{number:02d}\n" for number in range(1, 12)]
    assert curves(records(tmp_path, texts))["val/acc_pgd10"] == {0: 0.11}


def test_the_better_weights_of_the_epoch_are_chosen_and_raw_ones_where_they_are_equal() -> None:
    found = {
        "val/acc_pgd10": {0: 0.3, 1: 0.3, 2: 0.3},
        "val_ema/acc_pgd10": {1: 0.3, 2: 0.31},
        "val_max/acc_pgd10": {0: 0.3, 1: 0.3, 2: 0.31},
        "val_ema/acc_fgsm": {0: 0.9, 1: 0.9, 2: 0.9},
    }
    assert [chosen_weights(found, epoch, "val_max/acc_pgd10") for epoch in range(3)] == ["raw", "raw", "ema"]
    assert chosen_weights(found, 2, "val/acc_pgd10") == "raw"
    assert chosen_weights(found, 0, "val_ema/acc_pgd10") == "ema"


def test_collapse_by_the_published_rule() -> None:
    """More than 30 points between raw FGSM and PGD-10, at the first such epoch."""
    found = {"val/acc_fgsm": {0: 0.5, 1: 0.75, 2: 0.8}, "val/acc_pgd10": {0: 0.4, 1: 0.5, 2: 0.45}}
    assert collapse(found) == 2
    assert collapse({"val/acc_fgsm": {0: 0.5}, "val/acc_pgd10": {0: 0.25}}) is None
    assert seen({}) is None and seen({"monitor/co_events": {0: 0.0}}) is None


def test_the_epoch_of_the_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"epoch": 7, "state_dict": {}}, tmp_path / "checkpoints" / "best.ckpt")
    assert best_epoch(tmp_path) == 7


def test_what_a_training_cost() -> None:
    def net(*passes: int) -> dict[str, Any]:
        return {"training": dict(zip(("forwards", "input_backwards", "weight_backwards"), passes, strict=True))}

    cost = {"samples": 100, "seconds": 4.0, "networks": {"net": net(300, 100, 200), "other": net(50, 0, 0)}}
    found = training_cost(cost)
    assert (found["forwards"], found["backwards"], found["passes"]) == (3.5, 3, 650)
    assert found["images_per_second"] == 25 and found["peak_gib"] is None
    assert training_cost({**cost, "peak_memory": 2**31})["peak_gib"] == 2


# Tables ---------------------------------------------------------------------------------------------------------------


def figures(**changes: Any) -> dict[str, Any]:
    base = {"weights": "ema", "epoch": 9, "val_best": 40.0, "val_last": 39.0, "collapse": None, "seen": None}
    base |= {"clean": 80.0, "pgd10": 55.0, "pgd20": 54.0, "pgd50": 53.0, "autoattack": 50.0, "cr": 50.1}
    base |= {"forwards": 2.0, "backwards": 2.0, "passes": 4e6, "seconds": 100.0, "images_per_second": 10.0, "peak_gib": None}
    return {**base, **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in figures().items() if key != name}


def test_the_most_robust_come_first_and_those_without_autoattack_last() -> None:
    rows = {"a": [figures(autoattack=49.0)], "b": [figures(), figures(autoattack=52.0)], "c": [without("autoattack")]}
    assert ranked(rows) == ["b", "a", "c"]
    text = table(
        {**rows, "n_fgsm, paper": [figures(collapse=3, seen=2, weights="raw", epoch=1), figures(epoch=4, peak_gib=1.5)]}
    )
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6
    assert "| b | ema 9 | 80.0 ± 0.0 |" in text and "| 51.0 ± 1.4 |" in text
    assert "| n_fgsm, paper | raw 1, ema 4 |" in text and "| 3, - | 2, - |" in text
    assert "| c | ema 9 | 80.0 | 55.0 | 54.0 | 53.0 |  | 50.1 |" in text


def test_ours_beside_the_published() -> None:
    rows = {
        "liet": [figures(clean=80.0, autoattack=49.5), figures(clean=82.0, autoattack=50.5, collapse=5)],
        "ours": [figures()],
    }
    text, differences = against_published("cifar10", rows)
    assert list(differences) == ["liet"]
    assert differences["liet"]["clean"] == pytest.approx(81 - 80.68)
    assert differences["liet"]["autoattack"] == pytest.approx(50 - 49.99)
    assert "| liet | 81.0, 80.7, +0.3 | 53.0, 56.0, -3.0 | 50.0, 50.0, +0.0 |" in text
    assert "| 100, 2605 | -, 1.4 | 1/2, 0/3 |" in text
    assert against_published("cifar10_cpu", rows) == ("", {})


def test_the_published_tables() -> None:
    """Rows picked by hand from the publication's own page of results."""
    tables = published()["tables"]
    assert [len(tables[name]) for name in ("cifar10", "cifar100", "tiny_imagenet")] == [21, 21, 20]
    assert "n_aaer" not in tables["tiny_imagenet"] and not any("rs_aaer" in rows for rows in tables.values())
    first = {"clean": [82.36, 0.32], "pgd10": 55.05, "pgd20": 54.28, "pgd50": 54.17, "autoattack": [50.49, 0.15]}
    assert tables["cifar10"]["pgd_at_wa"] == {**first, "cr": [50.51, 0.16], "seconds": 7027, "gib": 1.39}
    assert tables["cifar10"]["elle"]["autoattack"] == [32.46, 25.27] and tables["cifar10"]["elle"]["gib"] == 2.5
    assert tables["cifar100"]["liet"]["autoattack"] == [26.64, 0.13] and tables["cifar100"]["nu_at"]["clean"] == [52.63, 14.39]
    assert tables["cifar100"]["pgd_at"]["cr"] == [20.81, 0.3] and tables["cifar100"]["fgsm_pgi"]["pgd50"] == 31.85
    assert tables["tiny_imagenet"]["fgsm_mep_cs"]["gib"] == 21.21 and tables["tiny_imagenet"]["grad_align"]["seconds"] == 35944
    for rows in tables.values():
        order = [row["autoattack"][0] for row in rows.values()]
        assert order == sorted(order, reverse=True), "as printed"
        for row in rows.values():
            assert row["clean"][0] > row["pgd10"] >= row["pgd20"] >= row["pgd50"] >= row["autoattack"][0] - 0.01
    for dataset, collapsed in published()["collapse"].items():
        assert dataset == "what" or set(collapsed) <= set(tables[dataset])


def test_a_plot_of_many_rows(tmp_path: Path) -> None:
    rows = {f"method {i}": [figures(autoattack=40 + i / 10, passes=1e6 * (1 + i % 3)) for _ in range(2)] for i in range(24)}
    rows["no autoattack"] = [without("autoattack")]
    plot(rows, "passes", "cifar10", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000


# The whole ------------------------------------------------------------------------------------------------------------


def test_rows_and_their_configs() -> None:
    rows = {row.name: row for row in rows_of("cifar100", "protocol")}
    assert set(published()["tables"]["cifar100"]) <= set(rows)
    assert rows["pgd_at"].method == rows["pgd_at_wa"].method == "pgd_at" and rows["pgd_at"].last and not rows["pgd_at_wa"].last
    assert rows["pgd_at"].command("cifar100") == rows["pgd_at_wa"].command("cifar100")
    files = rows["zero_grad"].configs("cifar100")
    assert [file.removeprefix("configs/fast_at/") for file in files] == [
        "cifar100.yaml",
        "methods/zero_grad.yaml",
        "methods/cifar100/zero_grad.yaml",
    ]
    paper = {row.name: row for row in rows_of("tiny_imagenet", "paper")}
    assert paper["elle"].label == "elle, paper" and "liet" not in paper and not paper["pgd_at"].last
    assert [file.rpartition("fast_at/")[2] for file in paper["fgsm_fuap"].configs("tiny_imagenet")][2:] == [
        "methods/tiny_imagenet/fgsm_fuap.yaml",
        "paper/fgsm_fuap.yaml",
        "paper/tiny_imagenet/fgsm_fuap.yaml",
    ]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--methods", "n_fgsm", "nothing"])
    assert stopped.value.code == 2 and "'nothing' is unknown in protocol: choose from elle" in capsys.readouterr().err


def fake_cifar10(folder: Path) -> None:
    """Files of the original's layout, five of them the same; classes differ in colour."""
    draws, root = np.random.default_rng(0), folder / "cifar-10-batches-py"
    root.mkdir()
    labels = draws.integers(10, size=10_000)
    pixels = (draws.integers(0, 128, (10_000, 3072)) + 12 * labels[:, None]).astype(np.uint8)
    (root / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}))
    for number in range(1, 6):
        (root / f"data_batch_{number}").symlink_to(root / "test_batch")


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """The benchmark is killed after the first epoch was saved, and then has the figures of one that was not."""
    fake_cifar10(tmp_path)
    small = "--trainer.max_epochs 3 --trainer.limit_train_batches 8 --trainer.limit_val_batches 1"
    small += " --trainer.check_val_every_n_epoch 1 --model.init_args.net.init_args.width 2"
    command = [sys.executable, "-m", "benchmarks.fast_at", "--dataset", "cifar10_cpu", "--methods", "n_fgsm", "pgd_at"]
    command += ["--seeds", "0", "--workers", "1", "--options", small, "--output"]
    environment = {**os.environ, "ROBUST_PL_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(output: Path) -> subprocess.Popen[bytes]:
        log = (tmp_path / f"{output.name}.log").open("a")
        return subprocess.Popen(
            [*command, str(output)], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    uninterrupted, killed = run(whole), run(cut)
    last = cut / "protocol" / "seed0" / "runs" / "n_fgsm" / "checkpoints" / "last.ckpt"
    for _ in range(6000):
        if last.exists() or killed.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    folder = cut / "protocol" / "seed0"
    assert last.exists() and not (folder / "n_fgsm.done").exists()
    assert run(cut).wait(2000) == 0 and uninterrupted.wait(2000) == 0, (tmp_path / "cut.log").read_text()[-3000:]
    assert (folder / "n_fgsm.resumed.log").exists() and not (folder / "pgd_at.resumed.log").exists()
    ours, theirs = (json.loads((output / "fast_at.json").read_text()) for output in (cut, whole))
    for name in ("n_fgsm", "pgd_at"):
        one, other = (found["rows"][name][0] for found in (ours, theirs))
        # Where a process begins, its network is measured on two samples.
        assert (one["passes"], one["forwards"]) == pytest.approx((other["passes"], other["forwards"]), rel=1e-2)
        left_out = ("seconds", "images_per_second", "peak_gib", "passes", "forwards")
        assert {k: v for k, v in one.items() if k not in left_out} == {k: v for k, v in other.items() if k not in left_out}
        assert {"clean", "pgd10", "pgd20", "pgd50", "autoattack", "cr"} <= set(one) and one["forwards"] >= 2
    assert ours["rows"]["pgd_at"][0]["epoch"] == 2 and ours["rows"]["pgd_at"][0]["weights"] == "raw"
    config = yaml.safe_load((folder / "runs" / "n_fgsm" / "config.yaml").read_text())
    assert config["model"]["class_path"] == "robust_pl.methods.NFGSM" and config["seed_everything"] == 0
    text = (cut / "fast_at.md").read_text()
    assert text.count("\n") == 4 and "| n_fgsm |" in text
    for name in ("fast_at_passes.png", "fast_at_seconds.png"):
        assert (cut / name).stat().st_size > 5_000
    # All is there: nothing is run again.
    before = sorted(folder.glob("*.log"))
    stamps = [path.stat().st_mtime_ns for path in before]
    assert run(cut).wait(300) == 0
    assert sorted(folder.glob("*.log")) == before and [path.stat().st_mtime_ns for path in before] == stamps
