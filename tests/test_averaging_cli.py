"""Averages as a user of the command line meets them: chosen by, tested, audited, named as weights; in two processes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import robust_pl as package
from robust_pl.callbacks import FGSM, PGD
from robust_pl.data import DigitsDataModule
from robust_pl.nets import SmallCNN, TrainedNet, load_weights

from .conftest import TINY
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process

CLI = Callable[..., None]
WITH_EMA = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9")
SMALL = ("--data.init_args.eval_batch_size", "60")


@pytest.fixture
def trained(robust_pl: CLI, tiny: Path) -> Path:
    robust_pl("fit", "-c", tiny, *WITH_EMA, "--run.monitor", "val_ema/acc_worst")
    return tiny


@pytest.mark.slow
def test_trained_tested_loaded_audited(robust_pl: CLI, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = "runs/tiny/checkpoints/best.ckpt"
    saved = torch.load(best, weights_only=True)
    assert "val_ema/acc_worst" in str(saved["callbacks"].keys())
    robust_pl("test", "--ckpt_path", best, *SMALL)
    said = capsys.readouterr().out
    assert "test of ema: 360 samples" in said and "runs/tiny/test-ema/report.md" in said
    for name, asked in (("test", None), ("test-ema", "ema")):
        folder = Path("runs/tiny", name)
        assert (folder / "report.md").is_file()
        assert json.loads((folder / "store.json").read_text())["request"].get("weights") == asked
        expected = package.evaluate(
            package.load_model("runs/tiny", weights=asked), DigitsDataModule(), {"fgsm": FGSM(0.1), "pgd": PGD(0.1, steps=3)}
        )
        figures = json.loads((folder / "figures.json").read_text())
        for key in ("acc_clean", "acc_fgsm", "acc_pgd", "acc_worst"):
            assert figures[key] == pytest.approx(expected.metrics[key], abs=1e-6), (name, key)
    robust_pl("audit", "runs/tiny")
    audited = capsys.readouterr().out
    assert "audit of runs/tiny/test: passed" in audited and "audit of runs/tiny/test-ema: passed" in audited
    # The same command again reads both; with the average alone taken away, that alone is computed again.
    tables = {name: Path("runs/tiny", name, "predictions.csv").read_bytes() for name in ("test", "test-ema")}
    Path("runs/tiny/test-ema/shards/00000060.safetensors").unlink()
    robust_pl("test", "--ckpt_path", best, *SMALL)
    assert all(Path("runs/tiny", name, "predictions.csv").read_bytes() == table for name, table in tables.items())
    assert not Path("runs/tiny/test-2").exists() and not Path("runs/tiny/test-2-ema").exists()

    # References.
    averaged = {**saved["state_dict"], **saved["robust_pl_averages"]["ema"]["weights"]}
    x = torch.rand(4, 1, 8, 8)
    for source, tensors in (("runs/tiny", saved["state_dict"]), ("runs/tiny#ema", averaged), (f"{best}#ema", averaged)):
        net = SmallCNN(width=4)
        load_weights(net, {name.removeprefix("net."): tensor for name, tensor in tensors.items()})
        for loaded in (package.load_model(source), TrainedNet(source).eval()):
            assert torch.equal(loaded(x), net.eval()(x)), source
    robust_pl(
        "fit", "-c", trained, "--model.init_args.weights", "runs/tiny#ema", "--run.name", "tuned", "--trainer.max_epochs", 1
    )
    robust_pl(
        *("fit", "-c", trained, "--run.name", "again", "--trainer.max_epochs", 1, "--model.init_args.net", "TrainedNet"),
        *("--model.init_args.net.init_args.source", "runs/tiny#ema"),
    )
    assert package.load_model("runs/again")(x).shape == (4, 10)
    for source, message in (
        ("runs/tiny#swa", "no average 'swa' (there: #ema)"),
        ("runs/no#ema", "no file of weights at runs/no"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            package.load_model(source)
        assert message in str(error.value)


@pytest.mark.slow
def test_stopped_in_the_middle_of_the_average_it_goes_on(
    robust_pl: CLI, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("test", "--ckpt_path", "runs/tiny/checkpoints/best.ckpt", *SMALL)
    real, calls = PGD.perturb, []

    def stops(self: PGD, problem: object, x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 4:  # raw, average, raw, average
            raise KeyboardInterrupt
        return real(self, problem, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(PGD, "perturb", stops)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            robust_pl(*command)
    shards = {name: [p.stem for p in sorted(Path("runs/tiny", name, "shards").iterdir())] for name in ("test", "test-ema")}
    assert shards == {"test": ["00000000", "00000060"], "test-ema": ["00000000"]}
    with monkeypatch.context() as patch:
        patch.setattr(PGD, "perturb", stops)
        robust_pl(*command)
    assert len(calls) == 4 + 2 * 6 - 3  # the finished batches are not attacked again
    robust_pl(*command, "--evaluation.output_dir", "whole")
    for name, whole in (("test", "whole"), ("test-ema", "whole-ema")):
        assert Path("runs/tiny", name, "predictions.csv").read_bytes() == Path(whole, "predictions.csv").read_bytes()


@pytest.mark.slow
def test_monitors(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", tiny, "--run.monitor", "val_ema/acc_worst")
    assert "needs the average 'ema'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", tiny, *WITH_EMA, "--run.monitor", "val_ema/acc_pdg")
    assert "will never be logged" in capsys.readouterr().err
    # An average that begins late: until then nothing is best.
    swa = ("--trainer.callbacks+=SWA", "--trainer.callbacks.start=1", "--trainer.callbacks.batches=1")
    robust_pl("fit", "-c", tiny, *swa, "--run.monitor", "val_swa/acc_worst", "--run.name", "late")
    assert torch.load("runs/late/checkpoints/best.ckpt", weights_only=True)["epoch"] == 1
    # Tested by a config that knows of no average.
    robust_pl("test", "-c", tiny, "--ckpt_path", "runs/late/checkpoints/best.ckpt")
    assert Path("runs/late/test-swa/report.md").is_file()
    # Whoever writes a checkpoint chooses no folder, and no other network.
    content = torch.load("runs/late/checkpoints/best.ckpt", weights_only=True)
    average = content["robust_pl_averages"].pop("swa")
    short = {"weights": {name: tensor[:1] for name, tensor in average["weights"].items()}}
    for name, broken, message in (("../x", average, "is none that this library writes"), ("swa", short, "another network")):
        content["robust_pl_averages"] = {name: broken}
        torch.save(content, "broken.ckpt")
        with pytest.raises(SystemExit):
            robust_pl("test", "-c", tiny, "--ckpt_path", "broken.ckpt")
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Raw weights as without averages, averages equal in both, and one or two processes give the same tables."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "probe.py").write_text(
        "import torch\n"
        "from lightning.pytorch import Callback\n"
        "class Probe(Callback):\n"
        "    def on_validation_end(self, trainer, pl_module):\n"
        "        averages = {c.name: c.weights for c in trainer.callbacks if hasattr(c, 'begun')}\n"
        "        torch.save(averages, f'rank{trainer.global_rank}.pt')\n"
    )
    swa = ("--trainer.callbacks+=SWA", "--trainer.callbacks.start=1", "--trainer.callbacks.batches=2")
    common = ("fit", "-c", "tiny.yaml", *DDP, "2", "--data.init_args.batch_size", "64")
    robust_pl_process(tmp_path, *common, *WITH_EMA, *swa, "--trainer.callbacks+=probe.Probe", "--run.name", "with")
    robust_pl_process(tmp_path, *common, "--run.name", "without")
    last = [torch.load(tmp_path / f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("with", "without")]
    assert all(torch.equal(t, last[1]["state_dict"][name]) for name, t in last[0]["state_dict"].items())
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == {"ema", "swa"}
    for key, weights in ranks[0].items():
        assert weights and all(torch.equal(tensor, ranks[1][key][name]) for name, tensor in weights.items()), key
    for devices in ("1", "2"):
        where = ("--evaluation.output_dir", f"test-{devices}")
        test = ("test", "--ckpt_path", "runs/with/checkpoints/last.ckpt", "-c", "tiny.yaml", *DDP, devices, *where)
        robust_pl_process(tmp_path, *test, *SMALL)
    for name in ("", "-ema", "-swa"):
        one, two = ((tmp_path / f"test-{devices}{name}" / "predictions.csv").read_bytes() for devices in ("1", "2"))
        assert one == two, name
    with (tmp_path / "test-2-swa" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 360
