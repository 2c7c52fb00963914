"""What is answered at once, without PyTorch and Lightning, and that it is what the parser of a run would say."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from robust_pl._quick import quickly
from robust_pl.cli import main
from robust_pl.cli_help import RUNS, SUBCOMMANDS, configs_in, mistake

CLI = Callable[..., None]

SLOW = ("torch", "lightning", "torchmetrics", "numpy", "yaml", "jsonargparse")
WITHOUT_TORCH = f"""
import sys

import robust_pl
import robust_pl.callbacks, robust_pl.data, robust_pl.methods, robust_pl.nets, robust_pl.scenes
from robust_pl.cli import main

for arguments in (
    ["--version"], ["--help"], ["-h"], [], ["fti"], ["--fti", "fit"], ["fit"], ["fit", "-c", "missing.yaml"],
    ["test", "--ckpt_path", "missing.ckpt"], ["audit", "--help"], ["report"], ["turntable", "--help"], ["audit", "missing"],
):
    try:
        main(arguments)
    except SystemExit as stop:
        print(*arguments, stop.code)
    found = [name for name in {SLOW!r} if name in sys.modules]
    assert not found, (arguments, found)
"""


def test_help_and_wrong_usage_need_neither_torch_nor_lightning(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for line in (
        "--help 0",
        "-h 0",
        "2",
        "fti 2",
        "--fti fit 2",
        "fit 2",
        "fit -c missing.yaml 2",
        "report 2",
        "audit missing 2",
    ):
        assert line in said
    complaints = done.stderr.splitlines()
    assert len(complaints) == 8 and all(line.startswith("robust-pl: error: ") for line in complaints)


def after(text: str, mark: str) -> str:
    return " ".join(text.partition(mark)[2].split())


def test_help_names_what_the_parser_of_a_run_names(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        robust_pl("--help")
    at_once = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        robust_pl("-c", tiny, "--help")  # which the real parser answers
    real = capsys.readouterr().out
    listed = "fit " + after(real, "    fit ")
    assert all(f"{name} {says}" in listed for name, says in SUBCOMMANDS.items())
    assert after(at_once, "    fit ").startswith(after(real, "    fit "))
    for option in ("-h, --help", "-c CONFIG, --config CONFIG", "--print_config"):
        assert option in at_once and option in real
    assert "--version" in at_once


@pytest.mark.parametrize("name", RUNS)
def test_each_run_shows_its_own_options(robust_pl: CLI, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        robust_pl(name, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert f"usage: robust-pl [options] {name} [-c CONFIG]" in said and RUNS[name] in said
    assert "robust_pl.methods.PGDAT" in said and "--attacks" in said and "--ckpt_path" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "name a subcommand, one of fit, validate, test, predict, audit, report, turntable: see robust-pl --help"),
        ("tset -c x.yaml", "'tset' is no subcommand: did you mean 'test'?"),
        ("x", "'x' is no subcommand: choose one of fit, validate, test, predict, audit, report, turntable"),
        ("--trainer.max_epochs 3 fit", "--trainer.max_epochs stands before the subcommand"),
        ("FIT -c there.yaml", "'FIT' is no subcommand: did you mean 'fit'?"),
        ("-c there.yaml", "no subcommand is named: begin with one of fit, validate"),
        ("--print_config", "no subcommand is named: begin with one of fit, validate"),
        ("-c there.yaml --help", None),
        ("fit there.yaml", "there.yaml follows fit and no option: an experiment is named by -c, such as fit -c there.yaml"),
        ("report there", None),
        ("predict", "predict needs a model and data: name an experiment, such as -c configs/quickstart.yaml"),
        ("fit -c none.yaml", "config=none.yaml does not exist"),
        ("fit -c there.yaml --config=none.yml", "config=none.yml does not exist"),
        ("-c none.yaml fit", "config=none.yaml does not exist"),
        ("fit -c there.yaml --config", None),
        ("fit -c there.yaml", None),
        ("--config=there.yaml fit", None),
        ("--print_config fit -c there.yaml", None),
        ("fit -c {trainer:none.yaml}", None),
        ("fit -c s3://bucket/none.yaml", None),
        ("fit --model.init_args.net none.yaml", None),
        ("audit", None),
        ("report --help", None),
    ],
)
def test_mistakes_that_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    found = mistake(arguments.split())
    assert found is None if said is None else found.startswith(said), found
    assert mistake(["fit", "-c", "no such (file), ü.yaml"]).startswith("config=no such (file), ü.yaml does not exist: name")


def test_of_several_processes_only_the_one_that_failed_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(error: str) -> str:
        def run(arguments: list[str]) -> None:
            raise RuntimeError(error)

        monkeypatch.setattr("robust_pl.cli._run", run)
        with pytest.raises(SystemExit, match="1"):
            main(["audit", "x"])
        return capsys.readouterr().err.removeprefix("robust-pl: error: ")

    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:55466. GLHF!"
    assert told(gloo) == "another process of this run has ended: see what it said\n"
    killed = told("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert killed.startswith(
        "a process that reads data was killed (Killed), perhaps for want of memory: set data.init_args.num_w"
    )
    assert told("DataLoader worker (pid(s) 7, 8) exited unexpectedly").startswith("a process that reads data ended, perhaps")
    with pytest.raises(RuntimeError, match="closed by peer"):
        told("Connection closed by peer")  # of whatever else


def test_configs_in_a_command_line() -> None:
    arguments = ["fit", "-c", "a.yaml", "--config=b.yaml", "--config", "c.yaml", "-c=d.yaml", "--model", "x"]
    assert list(configs_in(arguments)) == ["a.yaml", "b.yaml", "c.yaml", "d.yaml"]


def test_a_config_before_the_subcommand_holds_one_experiment_each(
    robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(tiny.read_text())
    both = {"fit": {**config, "seed_everything": 1}, "test": {**config, "seed_everything": 2}}
    Path("both.yaml").write_text(yaml.safe_dump(both))
    for name, seed in (("fit", "1"), ("test", "2")):
        with pytest.raises(SystemExit, match="0"):
            robust_pl("-c", "both.yaml", name, "--print_config")
        before = capsys.readouterr().out
        with pytest.raises(SystemExit, match="0"):
            robust_pl(name, "-c", tiny, "--seed_everything", seed, "--print_config")
        assert before == capsys.readouterr().out and f"seed_everything: {seed}" in before


def test_a_quick_import_collects_no_garbage_and_leaves_the_collector_on() -> None:
    frozen = gc.get_freeze_count()
    try:
        with quickly("torch"):  # there already
            assert gc.isenabled()
        assert gc.get_freeze_count() == frozen
        with pytest.raises(ImportError), quickly("a.package.that.is.not.there"):
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
        gc.disable()
        with quickly("a.package.that.is.not.there"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


NOT_NEEDED = (
    "trimesh",
    "networkx",
    "sklearn",
    "wandb",
    "pandas",
    "jinja2",
    "plotly",
    "kornia",
    "torchvision",
    "timm",
    "gsplat",
)


@pytest.mark.slow
def test_what_a_run_does_not_need_is_not_imported(tiny: Path) -> None:
    script = f"""
import gc, sys
from robust_pl.cli import main
try:
    main(["fit", "-c", {str(tiny)!r}, "--print_config"])
except SystemExit as stop:
    assert stop.code == 0
found = [name for name in {NOT_NEEDED!r} if name in sys.modules]
assert not found, found
assert gc.isenabled() and gc.get_freeze_count() > 300_000
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "seed_everything: 0" in done.stdout
