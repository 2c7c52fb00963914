"""An evaluation that is stopped at any moment goes on where it was, and ends with the same table."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, FGUAP, PGD, Attack, AutoAttack
from robust_pl.callbacks.attacks.problem import Problem
from robust_pl.callbacks.store import files
from robust_pl.callbacks.store.store import Store
from robust_pl.data import DigitsDataModule

SAMPLES, BATCH = 60, 16


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels are what the network says, so that there is something to break."""
    x = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, net()(x).argmax(1)


def attacks() -> dict[str, Attack]:
    return {"fgsm": FGSM(0.02), "pgd": PGD(0.02, steps=5, restarts=2)}


class Stop(Exception):
    pass


class Stopping(nn.Module):
    """Passes samples on to a network and counts them; at the given pass it stops."""

    def __init__(self, net: nn.Module, at: int | None = None) -> None:
        super().__init__()
        self.net, self.at, self.passes, self.images = net, at, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.images += len(x)
        if self.passes == self.at:
            raise Stop
        return self.net(x)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, int]:
    """A finished evaluation, and how many passes it took."""
    model = Stopping(net())
    evaluate(model, data(), attacks(), batch_size=BATCH, store=tmp_path / "whole")
    return tmp_path / "whole", model.passes


def test_the_table_says_what_happened_to_every_sample(whole: tuple[Path, int]) -> None:
    folder, _ = whole
    header, *rows = (folder / "predictions.csv").read_text().splitlines()
    of_attack = ["right", "prediction", "linf", "l2", "l1", "forwards", "backwards"]
    assert header.split(",") == [
        *("index", "label", "prediction", "confidence", "loss"),
        *(f"{kind}_{name}" for name in ("fgsm", "pgd") for kind in of_attack),
    ]
    assert [int(row.split(",")[0]) for row in rows] == list(range(SAMPLES))
    figures = json.loads((folder / "figures.json").read_text())
    right = [int(row.split(",")[5]) for row in rows]
    assert figures["acc_fgsm"] == pytest.approx(sum(right) / SAMPLES) and 0 < sum(right) < SAMPLES
    assert not (folder / "parts").exists()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_stopped_again_and_again_it_ends_the_same_and_repeats_nothing_finished(whole: tuple[Path, int], tmp_path: Path) -> None:
    folder, passes = whole
    spent = 0
    for _ in range(200):
        model = Stopping(net(), at=15)
        try:
            evaluate(model, data(), attacks(), batch_size=BATCH, store=tmp_path / "stopped")
            break
        except Stop:
            spent += model.passes
    else:
        pytest.fail("it never ends")
    assert spent > passes / 2
    for name in ("predictions.csv", "figures.json"):
        there, here = (path.joinpath(name).read_text() for path in (folder, tmp_path / "stopped"))
        if name == "figures.json":
            there, here = ({k: v for k, v in json.loads(t).items() if "seconds" not in k} for t in (there, here))
        assert there == here
    # The attack that was at work and the clean pass of the batch are done again, and nothing else.
    again = Stopping(net())
    evaluate(again, data(), attacks(), batch_size=BATCH, store=tmp_path / "stopped")
    assert again.passes == 0


def test_finished_parts_of_an_attack_are_not_computed_again(tmp_path: Path) -> None:
    """AutoAttack is stopped in the middle of its second part: the first one is taken from the disk."""
    x, y = data()

    def run(at: int | None, folder: Path) -> Stopping:
        model = Stopping(net(), at)
        attack = AutoAttack(0.01, version="custom", attacks=["apgd-ce", "apgd-dlr"])
        with suppress(Stop):
            evaluate(model, (x[:8], y[:8]), {"aa": attack}, batch_size=8, store=folder)
        return model

    whole = run(None, tmp_path / "whole")
    stopped = run(whole.passes - 20, tmp_path / "stopped")
    assert [p.name for p in (tmp_path / "stopped/parts/00000000").iterdir()] == ["aa.part-apgd-ce.safetensors"]
    rest = run(None, tmp_path / "stopped")
    assert rest.passes < whole.passes / 1.5 < stopped.passes
    assert (tmp_path / "whole/predictions.csv").read_bytes() == (tmp_path / "stopped/predictions.csv").read_bytes()


# Killed -----------------------------------------------------------------------------------------------------------


def _autoattack(folder: str) -> None:
    torch.set_num_threads(1)
    x, y = data()
    evaluate(net(), (x, y), {"autoattack": AutoAttack(0.02)}, batch_size=BATCH, store=folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_random_moments_of_autoattack(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")

    def run(folder: str, seconds: float | None) -> int | None:
        child = fork.Process(target=_autoattack, args=(folder,))
        child.start()
        child.join(seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return child.exitcode

    began = os.times().elapsed
    assert run(str(tmp_path / "whole"), None) == 0
    length = os.times().elapsed - began
    moments = random.Random(0)
    # Each try gets further than the one before only because what is finished is kept.
    ends = [run(str(tmp_path / "killed"), moments.uniform(0.02, 0.2) * length) for _ in range(20)]
    assert ends.count(-signal.SIGKILL) >= 5
    assert run(str(tmp_path / "killed"), None) == 0
    assert (tmp_path / "whole/predictions.csv").read_bytes() == (tmp_path / "killed/predictions.csv").read_bytes()
    assert not list((tmp_path / "killed").rglob("*.tmp"))


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("model", "another model"),
        ("data", "another data set"),
        ("settings", "attacks.pgd.eps: '0.02' there, '0.03' here"),
        ("attacks", "attacks.pgd"),
        ("batch", "batch_size: 16 there, 20 here"),
    ],
)
def test_another_evaluation_is_refused_and_nothing_is_touched(whole: tuple[Path, int], what: str, words: str) -> None:
    folder, _ = whole
    before = contents(folder)
    chosen = attacks()
    if what == "settings":
        chosen["pgd"] = PGD(0.03, steps=5, restarts=2)
    if what == "attacks":
        del chosen["pgd"]
    model, samples = Stopping(net(1 if what == "model" else 0)), data(1 if what == "data" else 0)
    with pytest.raises(ValueError, match=words):
        evaluate(model, samples, chosen, batch_size=20 if what == "batch" else BATCH, store=folder)
    assert contents(folder) == before
    assert model.passes == 0


def test_a_truncated_shard_is_named_and_computed_again_once_deleted(whole: tuple[Path, int]) -> None:
    folder, _ = whole
    before = contents(folder)
    shard = folder / "shards/00000016.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00000016.safetensors is damaged .*: delete this one file"):
        evaluate(net(), data(), attacks(), batch_size=BATCH, store=folder)
    shard.unlink()
    model = Stopping(net())
    evaluate(model, data(), attacks(), batch_size=BATCH, store=folder)
    assert model.images < 40 * BATCH
    assert contents(folder)["predictions.csv"] == before["predictions.csv"]


@pytest.mark.parametrize("nth", [1, 4, 9, 14])
def test_a_full_disk_loses_nothing_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, int], nth: int
) -> None:
    folder, count = tmp_path / "full", 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        evaluate(net(), data(), attacks(), batch_size=BATCH, store=folder)
    assert str(folder) in str(error.value.filename)
    assert not list(folder.rglob("*.tmp"))
    written = len(contents(folder)) if folder.exists() else 0
    monkeypatch.undo()
    model = Stopping(net())
    evaluate(model, data(), attacks(), batch_size=BATCH, store=folder)
    assert model.passes < whole[1] or written <= 1
    assert contents(folder)["predictions.csv"] == contents(whole[0])["predictions.csv"]


def test_two_processes_do_not_write_into_one_store(tmp_path: Path) -> None:
    first = Store(tmp_path / "store", {})
    with pytest.raises(ValueError, match="another process is evaluating"):
        Store(tmp_path / "store", {})
    first.close()
    Store(tmp_path / "store", {}).close()


@pytest.mark.parametrize("name", ["predictions.csv", "notes.tmp", "parts/mine", "shards/00000000.safetensors"])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="so it is not ours"):
        evaluate(net(), data(), attacks(), store=tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_what_a_process_left_that_was_killed_at_once_is_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    (tmp_path / "store.json.123.tmp").write_text("{")
    evaluate(net(), data(), attacks(), store=tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_changed_bit_is_not_sealed_again(whole: tuple[Path, int]) -> None:
    """The same command again must not make a damaged shard a good one: here the last bit of one pixel's mantissa."""
    folder, _ = whole
    shard = folder / "shards/00000016.safetensors"
    with safe_open(shard, "pt") as file:
        pixel = file.get_tensor("x_adv/pgd").numpy().tobytes()
    content = bytearray(shard.read_bytes())
    content[content.index(pixel) + 400] ^= 1
    shard.write_bytes(content)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"00000016.safetensors is damaged .*x_adv/pgd is not what was written"):
        evaluate(net(), data(), attacks(), batch_size=BATCH, store=folder)
    assert contents(folder) == before


# What is there is read ----------------------------------------


class Unfair(Attack):
    """Different every time: what is computed twice shows."""

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        self.sign = -getattr(self, "sign", 1.0)
        return problem.project(x + self.sign * problem.eps)


def test_a_finished_evaluation_is_read_and_not_computed(tmp_path: Path) -> None:
    first = evaluate(net(), data(), {"unfair": Unfair(0.05)}, batch_size=BATCH, store=tmp_path)
    before = contents(tmp_path)
    attack = Unfair(0.05)
    again = evaluate(net(), data(), {"unfair": attack}, batch_size=BATCH, store=tmp_path)
    assert attack.calls == 0 and again.metrics == first.metrics
    assert contents(tmp_path) == before


def test_what_a_universal_attack_learned_is_kept(tmp_path: Path) -> None:
    attack = FGUAP(0.1, epochs=2)
    digits = DigitsDataModule(eval_batch_size=200)
    evaluate(net(), digits, {"uap": attack}, store=tmp_path)
    shutil.rmtree(tmp_path / "shards")
    before = (tmp_path / "predictions.csv").read_bytes()
    again = FGUAP(0.1, epochs=2)
    again.fit = None  # type: ignore[method-assign]  # would fail
    evaluate(net(), digits, {"uap": again}, store=tmp_path)
    assert torch.equal(again.delta, attack.delta)
    assert (again.rate, again.fit_forwards) == (attack.rate, attack.fit_forwards)
    assert (tmp_path / "predictions.csv").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_is_read_does_not_keep_its_file_in_memory(whole: tuple[Path, int]) -> None:
    shards = sorted((whole[0] / "shards").iterdir())
    kept = [files.read_tensors(shard)[0]["index"] for shard in shards]
    assert len(torch.cat(kept)) == SAMPLES
    assert str(whole[0]) not in Path("/proc/self/maps").read_text()
