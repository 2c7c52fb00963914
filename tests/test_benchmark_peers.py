"""The benchmark beside other packages: sides take turns, what is missing is named, an environment is made once. No times."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
TINY = "--net SmallCNN --batch-size 4 --steps 2 --rounds 2 --threads 1"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # would hold for all tests
    module = importlib.import_module("benchmarks.peers")
    trained = module.trained_on_digits
    monkeypatch.setattr(module, "trained_on_digits", lambda robust: trained(robust, epochs=1))
    for name in ("torchattacks", "foolbox", "art", "art.attacks", "art.attacks.evasion"):
        monkeypatch.setitem(sys.modules, name, None)
    return module


class Weak:
    """A peer that takes its single step with the wrong sign and half of the length."""

    def __init__(self, net: nn.Module, eps: float, alpha: float, steps: int, random_start: bool) -> None:
        assert random_start and (eps, alpha, steps) in ((8 / 255, 2 / 255, 2), (0.2, 0.05, 2))
        assert all(p.requires_grad for p in net.parameters()) and not net.training
        self.net, self.alpha = net, alpha

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x_adv = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(self.net(x_adv), y), x_adv)
        return (x - self.alpha / 2 * gradient.sign()).clamp(0, 1)


def test_a_round_begins_with_another_side_each_time() -> None:
    timing = importlib.import_module("benchmarks.timing")
    calls: list[str] = []
    rounds = timing.Rounds("x", 3, "abc")
    rounds.run({side: lambda side=side: calls.append(side) for side in "abc"})
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {side: len(seconds) for side, seconds in rounds.seconds.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_taken_within_a_round() -> None:
    timing = importlib.import_module("benchmarks.timing")
    rounds = timing.Rounds("x", 3, "abc")
    rounds.seconds = {"a": [2.0, 3.0, 8.0], "b": [1.0, 2.0, 2.0], "c": [4.0, 3.0, 2.0]}
    found = rounds.figures("b")
    assert (found["a"]["ratio_min"], found["a"]["ratio_median"], found["a"]["ratio_max"]) == (1.5, 2.0, 4.0)
    assert found["c"]["ratio_median"] == 1.5 and found["c"]["median_s"] == 3.0 and found["b"]["ratio_max"] == 1.0


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("benchmarks.timing")
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    rounds, device = timing.Rounds("x", 1, "ab"), torch.device("cuda", 0)
    rounds.run({"a": lambda: time.sleep(0.05), "b": lambda: None}, device)
    assert waited == [device] * 8 and rounds.seconds["a"][0] >= 0.05  # sleep takes no CPU time
    assert (timing.unit(device), timing.unit()) == ("wall seconds", "CPU seconds")
    timing.now()
    assert len(waited) == 8


def test_a_weaker_attack_shows_and_missing_peers_are_named(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Weak))
    file = tmp_path / "peers.json"
    peers.main([*TINY.split(), "--json", str(file)])
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert set(report) == {"settings", "machine", "versions", "left_out", "of_lean", "of_ours", "strength"}
    assert set(report["left_out"]) == {"foolbox", "art"} and set(report["versions"]) == {"torchattacks"}
    assert list(report["of_lean"]) == ["ours", "lean", "torchattacks"] == list(report["of_ours"])
    assert all(len(s["seconds"]) == 2 and min(s["seconds"]) > 0 for s in report["of_lean"].values())
    for eps, found in zip((8 / 255, 0.2), report["strength"].values(), strict=True):
        ours, lean, weak = (found[side] for side in ("ours", "lean", "torchattacks"))
        assert ours["loss"] == pytest.approx(lean["loss"], rel=0.1) and weak["loss"] < lean["loss"] - 0.05
        assert weak["accuracy"] >= lean["accuracy"]
        assert eps / 2 < ours["furthest"] < 1.0001 * eps and weak["furthest"] < eps / 4
    assert "foolbox is left out (import foolbox: " in said and "art is left out (import art.attacks.evasion: " in said
    for line in ("times the time of lean (with the defaults at most 0.82)", "times faster (with the defaults at least 1.2)"):
        assert line in said
    assert "cross-entropy that ours reaches, of lean's: " in said and "torchattacks" in said and "CPU seconds" in said


def test_frozen_parameters_are_so_on_all_sides(peers: ModuleType, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    budget = peers.Budget(0.1, 0.05, 2)
    x, y = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, 1])
    seen: list[bool] = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(module[1].weight.requires_grad))
    for attack in peers.attacks(net, budget, x, [], frozen=True).values():
        attack(x, y)
    assert seen and not any(seen)
    assert net[1].weight.requires_grad  # of the network that was given: each side has its own


@pytest.mark.parametrize("wrong", ["--rounds 0", "--steps 0", "--only cleverhans"])
def test_wrong_arguments(peers: ModuleType, wrong: str) -> None:
    with pytest.raises(SystemExit):
        peers.main(wrong.split())


# The environment ------------------------------------------------------------------------------------------------------


def test_an_environment_is_made_once_and_the_benchmark_runs_in_it(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = importlib.import_module("benchmarks.environment")
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            (Path(command[3]) / "bin").mkdir(parents=True)
            (Path(command[3]) / "bin" / "python").touch()
        return SimpleNamespace(returncode=3 if "benchmarks.peers" in command else 0)

    monkeypatch.setattr(environment.subprocess, "run", run)
    folder = tmp_path / "env"
    with pytest.raises(SystemExit) as end:
        peers.main(["--rounds", "2", "--install", str(folder), "--only", "art"])
    assert end.value.code == 3  # of the benchmark
    venv, torch_, checkout, *others, again = commands
    python = str(folder / "bin" / "python")
    assert venv == [sys.executable, "-m", "venv", str(folder)]
    assert torch_ == [python, "-m", "pip", "install", "--quiet", f"torch=={torch.__version__}"]
    assert checkout[-2:] == ["-e", str(ROOT)]
    assert [command[5:] for command in others] == [
        ["--no-deps", "torchattacks==3.5.1"],
        ["foolbox==3.3.4"],
        ["adversarial-robustness-toolbox==1.20.1"],
    ]
    assert again == [python, "-m", "benchmarks.peers", "--rounds", "2", "--only", "art"]

    commands.clear()
    with pytest.raises(SystemExit):
        peers.main([f"--install={folder}"])
    assert commands == [[python, "-m", "benchmarks.peers"]]

    autoattack = importlib.import_module("benchmarks.autoattack")
    commands.clear()
    with pytest.raises(SystemExit) as end:
        autoattack.main(["--samples", "4", "--install", str(folder), "--source", "a.whl"])
    assert ["--no-deps", "a.whl"] in [command[5:] for command in commands]  # another list: the folder is completed
    assert end.value.code == 0 and commands[-1][1:5] == ["-m", "benchmarks.autoattack", "--samples", "4"]


def test_what_pip_refuses_ends_it(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = importlib.import_module("benchmarks.environment")
    monkeypatch.setattr(environment.subprocess, "run", lambda command: SimpleNamespace(returncode=int("pip" in command)))
    (tmp_path / "env").mkdir()
    with pytest.raises(SystemExit, match=r"this command failed: .*pip install --quiet torch=="):
        peers.main(["--install", str(tmp_path / "env")])
    assert not (tmp_path / "env" / environment.DONE).exists()


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *TINY.split(), "--only", "foolbox", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {"ours", "lean"} <= set(json.loads(file.read_text())["of_lean"]) and "CPU seconds" in done.stdout
