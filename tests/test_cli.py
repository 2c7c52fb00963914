"""The command line, as a user runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import robust_pl as package
from robust_pl.callbacks import FGSM, PGD
from robust_pl.data import DigitsDataModule

from .conftest import CONFIGS

CLI = Callable[..., None]
BEST = "runs/tiny/checkpoints/best.ckpt"


def table(folder: str) -> list[dict[str, str]]:
    with Path(folder, "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(run: str, version: int) -> dict[str, float]:
    with Path(run, "metrics", f"version_{version}", "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: float(value) for row in rows for key, value in row.items() if value}


@pytest.fixture
def logged(tiny: Path) -> Path:
    """The tiny experiment with a CSV logger."""
    config = yaml.safe_load(tiny.read_text())
    config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs/tiny", "name": "metrics"},
    }
    tiny.write_text(yaml.safe_dump(config))
    return tiny


def test_fit_test_and_predict(robust_pl: CLI, logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("fit", "-c", logged)
    assert f"robust-pl test --ckpt_path {BEST}" in capsys.readouterr().out
    validated = metrics("runs/tiny", 0)
    assert {
        "train/loss",
        "val/loss",
        "val/acc_clean",
        "val/acc_fgsm",
        "val/acc_pgd",
        "val/acc_worst",
    } <= validated.keys()

    robust_pl("test", "--ckpt_path", BEST)
    said = capsys.readouterr().out
    assert "worst of all" in said and "360 samples" in said
    tested = metrics("runs/tiny", 1)
    assert (tested["test/forwards_pgd"], tested["test/backwards_pgd"]) == (3, 3)
    assert tested["test/seconds_pgd"] > 0

    rows = table("runs/tiny/test")
    assert [int(row["index"]) for row in rows] == list(range(360))
    right = {name: [row[f"prediction{name}"] == row["label"] for row in rows] for name in ("", "_fgsm", "_pgd")}
    assert tested["test/acc_clean"] == pytest.approx(np.mean(right[""]), abs=1e-6)
    assert tested["test/acc_pgd"] == pytest.approx(np.mean(right["_pgd"]), abs=1e-6)
    assert tested["test/acc_worst"] == pytest.approx(np.mean(np.all(list(right.values()), axis=0)), abs=1e-6)
    assert all(float(row["linf_pgd"]) <= 0.1 + 1e-6 for row in rows)

    # The same figures without a Trainer.
    report = package.evaluate(
        package.load_model("runs/tiny"),
        DigitsDataModule(),
        {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=3)},
        batch_size=50,
    )
    for name in ("acc_clean", "acc_fgsm", "acc_pgd", "acc_worst", "worst_class_worst"):
        assert tested[f"test/{name}"] == pytest.approx(report.metrics[name], abs=1e-6), name

    robust_pl("predict", "--ckpt_path", BEST)
    assert table("runs/tiny/predict") == rows
    x = DigitsDataModule().test_set.read(torch.arange(360), None)[0]
    shards = [load_file(path) for path in sorted(Path("runs/tiny/predict/shards").glob("*.safetensors"))]
    assert torch.cat([shard["index"] for shard in shards]).tolist() == list(range(360))
    x_adv = torch.cat([shard["x_adv/pgd"] for shard in shards])
    assert x_adv.dtype == torch.float32 and (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_the_best_checkpoint_by_accuracy_and_worst_class(
    robust_pl: CLI, logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robust_pl("fit", "-c", logged, "--trainer.max_epochs", 5, "--run.monitor", "val/fair_pgd")
    with Path("runs/tiny/metrics/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/fair_pgd"]]
    fair = [float(row["val/fair_pgd"]) for row in rows]
    summed = [float(row["val/acc_pgd"]) + float(row["val/worst_class_pgd"]) for row in rows]
    assert len(fair) == 5 and fair == pytest.approx(summed, abs=1e-6)
    assert not any("class_acc" in key for key in rows[0])  # in test alone
    best = torch.load(BEST, weights_only=True)
    (state,) = [state for state in best["callbacks"].values() if state.get("monitor") == "val/fair_pgd"]
    assert best["epoch"] == int(np.argmax(fair)) and state["best_model_score"].item() == pytest.approx(max(fair), abs=1e-6)

    capsys.readouterr()
    robust_pl("test", "--ckpt_path", BEST)
    said = capsys.readouterr().out
    assert "NSD" in said and "class_acc" not in said
    tested, rows = metrics("runs/tiny", 1), table("runs/tiny/test")
    threes = [row["prediction_pgd"] == "3" for row in rows if row["label"] == "3"]
    assert tested["test/class_acc_pgd/3"] == pytest.approx(np.mean(threes), abs=1e-6)
    assert sum("/class_acc_" in key for key in tested) == 4 * 10
    by_class = [tested[f"test/class_acc_worst/{k}"] for k in range(10)]
    assert tested["test/nsd_worst"] == pytest.approx(np.std(by_class) / np.mean(by_class), abs=1e-6)
    figures = json.loads(Path("runs/tiny/test/figures.json").read_text())
    assert figures["class_acc_worst/7"] == pytest.approx(by_class[7], abs=1e-6)
    report = Path("runs/tiny/test/report.md").read_text()
    assert "## Classes" in report and "(images/classes.png)" in report


def test_one_run_one_folder(robust_pl: CLI, tiny: Path) -> None:
    constant = ("--model.init_args.schedule", "null")
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, *constant)
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, *constant)
    first, second = Path("runs/tiny"), Path("runs/tiny-2")
    for run in (first, second):
        assert (run / "checkpoints/best.ckpt").is_file() and (run / "checkpoints/last.ckpt").is_file()
        assert (run / "images/val_epoch000_pgd.png").is_file()
        assert json.loads((run / "run.json").read_text())["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in Path().iterdir() if p.name != "runs") == ["tiny.yaml"]
    robust_pl("fit", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt", "--trainer.max_epochs", 2)
    assert torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert not Path("runs/tiny-3").exists()


def test_overrides_and_fractions(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        robust_pl(
            *(
                "fit",
                "-c",
                tiny,
                "--attacks.pgd.init_args.eps=4/255",
                "--model.init_args.attack.init_args.eps",
                "8/255",
            ),
            *("--model.init_args.optimizer.init_args.lr", 0.3, "--print_config"),
        )
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["attacks"]["pgd"]["init_args"]["eps"] == "4/255"
    assert config["attacks"]["pgd"]["init_args"]["steps"] == 3
    assert config["model"]["init_args"]["attack"]["init_args"]["eps"] == "8/255"
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.3


def test_a_second_config_replaces_the_attacks(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("strong.yaml").write_text("attacks: {pgd50: {class_path: PGD, init_args: {eps: 0.2, steps: 50}}}\n")
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", tiny, "-c", "strong.yaml", "--print_config")
    assert list(yaml.safe_load(capsys.readouterr().out)["attacks"]) == ["pgd50"]


def test_cheaper_attacks_for_validation(robust_pl: CLI, logged: Path) -> None:
    cheap = ("--val_attacks.cheap", "FGSM", "--val_attacks.cheap.init_args.eps", 0.1)
    robust_pl("fit", "-c", logged, "--trainer.max_epochs", 1, *cheap)
    names = {key for key in metrics("runs/tiny", 0) if key.startswith("val/acc")}
    assert names == {"val/acc_clean", "val/acc_cheap", "val/acc_worst"}


def test_a_test_without_attacks_says_so(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("test", "-c", tiny, "--attacks", "{}")
    said = capsys.readouterr().out
    assert "only clean accuracy was measured" in said and "worst of all" not in said


def test_a_new_method_in_a_users_file(robust_pl: CLI, tiny: Path) -> None:
    Path("mymethods.py").write_text(
        '"""My method."""\n'
        "import torch.nn.functional as F\n"
        "from robust_pl.methods import Method\n"
        "class Mine(Method):\n"
        '    """Mean of clean and adversarial cross-entropy."""\n'
        "    def loss(self, example):\n"
        "        clean = F.cross_entropy(self(example.x), example.y)\n"
        "        return (clean + F.cross_entropy(self(example.x_adv), example.y)) / 2\n"
    )
    assert len(Path("mymethods.py").read_text().splitlines()) <= 25
    robust_pl("fit", "-c", tiny, "--model", "mymethods.Mine", "--trainer.max_epochs", 1)
    assert torch.load(BEST, weights_only=True)["hyper_parameters"]["_class_path"] == "mymethods.Mine"
    # The checkpoint alone may not choose code; the user may.
    with pytest.raises(SystemExit):
        robust_pl("test", "--ckpt_path", BEST)
    robust_pl("test", "--ckpt_path", BEST, "--model", "mymethods.Mine")


def comes_before(path: Path) -> list[Path]:
    """What a config that is a part of an experiment comes behind."""
    if path.parent.name in ("attacks", "analysis"):
        return [CONFIGS / "quickstart.yaml"]
    group, *inner = (*path.relative_to(CONFIGS).parent.parts, "")
    if group != "fast_at" or inner == [""]:
        return []
    dataset = inner[1] or "cifar10"
    parts = [f"{dataset}.yaml", f"methods/{path.name}", f"methods/{dataset}/{path.name}", f"paper/{path.name}"]
    files = [CONFIGS / "fast_at" / part for part in parts]
    kept = files[: files.index(path)] if path in files else files
    return [file for i, file in enumerate(kept) if i < 2 or file.is_file()]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_config_round_trips(
    robust_pl: CLI, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = comes_before(path)
    with pytest.raises(SystemExit) as stop:
        robust_pl("fit", *(part for config in (*whole, path) for part in ("-c", config)), "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", tmp_path / "printed.yaml", "--print_config")
    assert capsys.readouterr().out == printed
    assert path.read_text().startswith("#"), "the header says what to expect"


def test_version(robust_pl: CLI, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("--version")
    assert capsys.readouterr().out == f"robust-pl {package.__version__}\n"


def test_callbacks_of_the_user_take_the_place_of_ours(robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(tiny.read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1, "filename": "{epoch}"}},
        {"class_path": "RobustEvaluation", "init_args": {"num_classes": 10}},
        {"class_path": "ImageGrid", "init_args": {"samples": 3}},
    ]
    tiny.write_text(yaml.safe_dump(config))
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    assert len(list(Path("runs/tiny").rglob("epoch=0.ckpt"))) == 1
    with Image.open("runs/tiny/images/val_epoch000_pgd.png") as picture:
        assert picture.size[0] == 110 + 3 * 102
    capsys.readouterr()
    robust_pl("test", "--ckpt_path", BEST)
    assert capsys.readouterr().out.count("worst of all") == 1


def test_a_network_that_passes_its_arguments_on_is_rebuilt(robust_pl: CLI, tiny: Path) -> None:
    Path("mynets.py").write_text(
        "from robust_pl.nets import SmallCNN\n"
        "class Mine(SmallCNN):\n"
        "    def __init__(self, width: int = 4, **kwargs):\n"
        "        super().__init__(width=width, **kwargs)\n"
    )
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--model.init_args.net", "mynets.Mine")
    net = package.load_model("runs/tiny", named=["mynets.Mine"])
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_fractions_in_a_checkpoint_are_read_without_the_command_line(robust_pl: CLI, tiny: Path) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--model.init_args.attack.init_args.eps", "8/255")
    code = f"from robust_pl.methods import PGDAT; print(PGDAT.load_from_checkpoint({BEST!r}).attack.eps)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "8/255", done.stderr
