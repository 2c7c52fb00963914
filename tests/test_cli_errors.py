"""Bad input ends with 2 and one line that names the field, the value and the remedy, before anything runs."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CLI = Callable[..., None]


@pytest.fixture
def complaint(robust_pl: CLI, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    # Handlers that earlier runs left behind write to a stream that is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            robust_pl(*arguments)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Traceback" in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("robust-pl: error: ")
        return lines[0].removeprefix("robust-pl: error: ")

    return run


ATTACK = "--attacks.pgd.init_args"
TRAINING_ATTACK = "--model.init_args.attack.init_args"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((f"{ATTACK}.eps", "8"), ["eps=8", "above 1", "8/255"]),
        ((f"{ATTACK}.eps", "-0.1"), ["eps=-0.1", "at least 0"]),
        ((f"{ATTACK}.eps", "8//255"), ["attacks.pgd.init_args.eps", "8//255", "8/255"]),
        ((f"{ATTACK}.step_size", "0"), ["step_size=0", "2/255"]),
        ((f"{ATTACK}.steps", "0"), ["steps=0", "at least 1"]),
        ((f"{ATTACK}.norm", "l3"), ["attacks.pgd.init_args.norm", "l3", "l2"]),
        ((f"{ATTACK}.epss", "0.1"), ["epss", "did you mean eps"]),
        ((f"{TRAINING_ATTACK}.eps", "8"), ["eps=8", "8/255"]),
        (("--attacks.new", "PDG"), ["attacks.new", "PDG", "did you mean PGD"]),
        (("--model", "PGDTA"), ["model", "PGDTA", "did you mean PGDAT"]),
        (("--data", "DigitDataModule"), ["DigitDataModule", "did you mean DigitsDataModule"]),
        (("--model.init_args.net", "SmalCNN"), ["SmalCNN", "did you mean SmallCNN"]),
        (("--model.init_args.attack", "SmallCNN"), ["model.init_args.attack='SmallCNN'", "no class of the kind"]),
        (("--model", "nowhere.Mine"), ["nowhere.Mine"]),
        (("--attacks.worst", "PGD"), ["'worst'", "another name"]),
        (("--trainer.max_epochz", "3"), ["max_epochz"]),
        (("--trainer.max_epochs", "many"), ["trainer.max_epochs", "many", "int"]),
        (("--model.init_args.net.init_args.widht", "3"), ["net.init_args.widht", "did you mean width"]),
        (("--data.init_args.batch_size", "0"), ["batch_size", "at least 1"]),
        (("--data.init_args.batch_size", "5000"), ["batch_size=5000", "lower batch_size"]),
        (("--data", "CIFAR10DataModule", "--data.init_args.data_dir", "nowhere"), ["nowhere", "ROBUST_PL_DATA"]),
        (("--model.init_args.weights", "no.pth"), ["no.pth", "ROBUST_PL_DATA"]),
        (("--ckpt_path", "none.ckpt"), ["none.ckpt"]),
        (("--run.output_dir", "tiny.yaml"), ["tiny.yaml", "--run.output_dir"]),
        (("-c", "missing.yaml"), ["missing.yaml"]),
    ],
)
def test_bad_arguments(complaint: Callable[..., str], tiny: Path, arguments: tuple[str, ...], parts: list[str]) -> None:
    said = complaint("fit", "-c", tiny, *arguments)
    for part in parts:
        assert part in said, said
    assert len(said) < 400


def test_an_argument_of_another_class_is_not_suggested_to_itself(complaint: Callable[..., str], tiny: Path) -> None:
    said = complaint("fit", "-c", tiny, "--model.init_args.net.init_args.weights", "x")
    assert "no argument 'weights'" in said and "did you mean weights?" not in said, said


@pytest.mark.parametrize(("arguments", "part"), [((), "subcommand"), (("fti",), "'fit'"), (("fit",), "-c configs/")])
def test_no_experiment(complaint: Callable[..., str], arguments: tuple[str, ...], part: str) -> None:
    assert part in complaint(*arguments)


def test_two_attacks_with_one_name(complaint: Callable[..., str], tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("  fgsm:\n", "  pgd:\n"))
    assert "pgd" in complaint("fit", "-c", tiny)


NETS = """
import torch
from torch import nn
class Base(nn.Module):
    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.layer = nn.Linear(64, self.outputs)
    outputs = 10
    def forward(self, x):
        return self.layer(x.flatten(1))
class TooFew(Base):
    outputs = 7
class Softmax(Base):
    def forward(self, x):
        return super().forward(x).softmax(1)
"""
DATA = """
import torch
from robust_pl.data import DigitsDataModule
from robust_pl.data.images import Images
class Broken(DigitsDataModule):
    def load_train(self):
        images = super().load_train()
        return Wrapped(images, self.flaw)
    flaw = ""
class Wrapped(Images):
    def __init__(self, images, flaw):
        self.images, self.flaw = images, flaw
    def __len__(self):
        return len(self.images)
    def read(self, index, keys):
        x, y = self.images.read(index, keys)
        return {"range": (x * 255, y), "nan": (x * float("nan"), y), "labels": (x, y + 5)}[self.flaw]
class Range(Broken):
    flaw = "range"
class NaN(Broken):
    flaw = "nan"
class Labels(Broken):
    flaw = "labels"
"""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--model.init_args.net", "badnets.TooFew"), ["7 logits", "num_classes is 10"]),
        (("--model.init_args.net", "badnets.Softmax"), ["softmax", "logits"]),
        (("--data", "baddata.Range"), ["255", "[0, 1]", "Normalize"]),
        (("--data", "baddata.NaN"), ["nan", "[0, 1]"]),
        (("--data", "baddata.Labels"), ["14", "10 classes"]),
    ],
)
@pytest.mark.parametrize("sanity_check", [0, 1])
def test_what_does_not_fit_is_said_before_training(
    complaint: Callable[..., str], tiny: Path, arguments: tuple[str, ...], parts: list[str], sanity_check: int
) -> None:
    Path("badnets.py").write_text(NETS)
    Path("baddata.py").write_text(DATA)
    said = complaint("fit", "-c", tiny, *arguments, "--trainer.num_sanity_val_steps", sanity_check)
    for part in parts:
        assert part in said, said
    assert not list(Path("runs").rglob("*.ckpt"))


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_a_checkpoint_cannot_run_code(complaint: Callable[..., str], robust_pl: CLI, tiny: Path) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    best = Path("runs/tiny/checkpoints/best.ckpt")
    checkpoint = torch.load(best, weights_only=True)

    Path("evil.py").write_text("from pathlib import Path\nPath('executed').touch()\nclass Method:\n    pass\n")
    checkpoint["robust_pl_config"]["model"]["class_path"] = "evil.Method"
    checkpoint["hyper_parameters"]["_class_path"] = "evil.Method"
    checkpoint["hyper_parameters"]["net"]["class_path"] = "evil.Method"
    torch.save(checkpoint, "named.ckpt")
    said = complaint("test", "--ckpt_path", "named.ckpt")
    assert "evil.Method" in said and "trust" in said
    with pytest.raises(ValueError, match=r"evil\.Method"):
        from robust_pl import load_model

        load_model("named.ckpt")

    checkpoint["robust_pl_config"]["model"] = {
        "class_path": "robust_pl.methods.StandardTraining",
        "init_args": {"net": {"class_path": "robust_pl.nets.SmallCNN"}, "optimizer": "os.system"},
    }
    torch.save(checkpoint, "function.ckpt")
    assert "os.system" in complaint("test", "--ckpt_path", "function.ckpt")

    checkpoint["state_dict"] = Evil()
    torch.save(checkpoint, "pickled.ckpt")
    assert "run code" in complaint("test", "--ckpt_path", "pickled.ckpt")
    assert "run code" in complaint("test", "-c", tiny, "--ckpt_path", "pickled.ckpt")
    Path("raw.ckpt").write_bytes(pickle.dumps(Evil()))
    complaint("test", "--ckpt_path", "raw.ckpt")
    assert not Path("executed").exists()


def test_checkpoints_that_do_not_fit(complaint: Callable[..., str], robust_pl: CLI, tiny: Path) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    best = Path("runs/tiny/checkpoints/best.ckpt")
    said = complaint("test", "-c", tiny, "--model.init_args.net.init_args.width", 8, "--ckpt_path", best)
    assert "another network" in said and "(8," in said

    Path("cut.ckpt").write_bytes(best.read_bytes()[:2000])
    assert "truncated" in complaint("test", "--ckpt_path", "cut.ckpt")

    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "bare.ckpt")
    assert "-c" in complaint("test", "--ckpt_path", "bare.ckpt")
    torch.save({"state_dict": {}}, "weights.pth")
    assert "model.init_args.weights" in complaint("test", "-c", tiny, "--ckpt_path", "weights.pth")


def test_a_full_disk_loses_nothing(
    complaint: Callable[..., str], robust_pl: CLI, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from lightning.pytorch import Trainer

    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--model.init_args.schedule", "null")
    last = Path("runs/tiny/checkpoints/last.ckpt")
    before = last.read_bytes()

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "last.ckpt")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    said = complaint("fit", "--ckpt_path", last, "--trainer.max_epochs", 2)
    assert "No space left" in said and "--run.output_dir" in said
    assert last.read_bytes() == before


LEVERS = {
    "a class that runs commands, for an untyped argument": {
        "class_path": "torch.nn.Linear",
        "init_args": {
            "in_features": 1,
            "out_features": 1,
            "device": {
                "class_path": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
                "init_args": {"entrypoint": "touch", "args": ["executed"], "env": {}, "stdout": None, "stderr": None},
            },
        },
    },
    "YAML in a string": '{"class_path": "evil.Net"}',
    "a YAML file that lies beside": "nearby.yaml",
    "an interpolation": "${run.project}.${run.group}",
    "the name of the checkpoint itself": {"class_path": "evil.Net"},
}


@pytest.mark.parametrize("lever", LEVERS.values(), ids=LEVERS)
def test_no_way_round(complaint: Callable[..., str], robust_pl: CLI, tiny: Path, lever: object) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--run.project", "evil", "--run.group", "Net")
    Path("evil.py").write_text("from pathlib import Path\nPath('executed').touch()\nfrom torch import nn\nNet = nn.Identity\n")
    Path("nearby.yaml").write_text("class_path: evil.Net\n")
    checkpoint = torch.load("runs/tiny/checkpoints/best.ckpt", weights_only=True)
    checkpoint["robust_pl_config"]["model"]["init_args"]["net"] = lever
    checkpoint["hyper_parameters"]["net"] = lever
    torch.save(checkpoint, "evil.Net")
    complaint("test", "--ckpt_path", "evil.Net")
    from robust_pl import load_model
    from robust_pl.methods import PGDAT

    for load in (load_model, PGDAT.load_from_checkpoint):
        with pytest.raises((ValueError, TypeError)):
            load("evil.Net")
    assert not Path("executed").exists()


def test_a_schedule_cannot_be_stretched(complaint: Callable[..., str], robust_pl: CLI, tiny: Path) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    said = complaint("fit", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt", "--trainer.max_epochs", 2)
    assert "10 steps" in said and "20" in said and "model.init_args.weights" in said


def test_a_bug_in_a_users_method_has_a_place(complaint: Callable[..., str], tiny: Path) -> None:
    Path("buggy.py").write_text(
        "from robust_pl.methods import Method\nclass Buggy(Method):\n    def loss(self, example):\n        return None + 1\n"
    )
    assert "in buggy.py, line 4" in complaint("fit", "-c", tiny, "--model", "buggy.Buggy")


def test_a_monitor_that_nobody_logs(complaint: Callable[..., str], tiny: Path) -> None:
    said = complaint("fit", "-c", tiny, "--run.monitor", "val/acc_pgdd")
    assert "val/acc_pgdd" in said and "val/acc_pgd," in said
    said = complaint("fit", "-c", tiny, "--run.monitor", "val/fair_pgdd")
    assert "val/fair_pgdd" in said and "val/fair_pgd," in said
    said = complaint("fit", "-c", tiny, "--run.monitor", "val/nsd_pgd")
    assert "better the smaller" in said and "take val/fair_pgd," in said


def test_files_of_the_user_are_not_written_over(complaint: Callable[..., str], robust_pl: CLI, tiny: Path) -> None:
    Path("mine").mkdir()
    Path("mine/predictions.csv").write_text("kept")
    assert "predictions.csv" in complaint("test", "-c", tiny, "--evaluation.output_dir", "mine")
    assert Path("mine/predictions.csv").read_text() == "kept"
