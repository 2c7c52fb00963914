"""Natural shifts and Imagenette from the command line, as a user runs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robust_pl.data.label_maps import classes_of, imagenet_wnids
from robust_pl.nets import SmallCNN

from .conftest import CONFIGS

CLI = Callable[..., None]
REAL = Path(os.environ.get("ROBUST_PL_DATA", "/nonexistent"))
needs_files = pytest.mark.skipif(not (REAL / "imagenette").is_dir(), reason="needs Imagenette's files")
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def noise(root: Path, folders: list[str]) -> None:
    """One small random image a folder."""
    rng = np.random.default_rng(0)
    for name in folders:
        (root / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / "a.png")


def config(data: str, folder: Path, **more: object) -> dict[str, object]:
    init = {"data_dir": str(folder), "image_size": 8, "resize": 8, "num_workers": 0, "eval_batch_size": 100, **more}
    return {
        "model": {
            "class_path": "StandardTraining",
            "init_args": {"net": {"class_path": "SmallCNN", "init_args": {"width": 4}}},
        },
        "data": {"class_path": data, "init_args": init},
        "attacks": {"fgsm": {"class_path": "FGSM", "init_args": {"eps": 0.02}}},
        "trainer": {"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_network_of_1000_classes_is_tested_on_200_and_audited(
    robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of a test are not those of the training; the network is built with ImageNet's classes, and 200 of them count."""
    noise(here / "imagenet" / "train", list(imagenet_wnids()))
    noise(here / "imagenet" / "val", list(imagenet_wnids()))
    noise(here / "imagenet-a", list(classes_of("imagenet_a")))
    Path("fit.yaml").write_text(yaml.safe_dump(config("ImageNetDataModule", here / "imagenet", val_size=100)))
    robust_pl("fit", "-c", "fit.yaml", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2, "--run.name", "net")
    a = config("ImageNetADataModule", here)
    Path("a.yaml").write_text(yaml.safe_dump({"data": a["data"]}))
    best = "runs/net/checkpoints/best.ckpt"
    robust_pl("test", "-c", "fit.yaml", "-c", "a.yaml", "--ckpt_path", best)
    said = capsys.readouterr().out
    assert "200 samples" in said
    rows = Path("runs/net/test/predictions.csv").read_text().splitlines()
    net = SmallCNN(1000, 3, 4)
    state = torch.load(best, weights_only=True)["state_dict"]
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    names = [str(here / "imagenet-a" / name / "a.png") for name in classes_of("imagenet_a")]
    x = torch.stack([torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1) / 255 for name in names])
    numbers = [group[0] for group in classes_of("imagenet_a").values()]
    expected = net.eval()(x)[:, numbers].argmax(1).tolist()
    column = rows[0].split(",").index("prediction")
    assert [int(row.split(",")[column]) for row in rows[1:]] == expected
    robust_pl("audit", "runs/net")
    assert "passed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_of_10_classes_is_refused(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(here / "imagenet-r", list(classes_of("imagenet_r")))
    torch.save(SmallCNN(10, 3, 4).state_dict(), "ten.pt")
    Path("r.yaml").write_text(yaml.safe_dump(config("ImageNetRDataModule", here)))
    with pytest.raises(SystemExit) as stop:
        robust_pl("test", "-c", "r.yaml", "--model.init_args.weights", "ten.pt")
    assert stop.value.code == 2
    assert "linear.weight (10, 8) in the file, (1000, 8) in the network" in capsys.readouterr().err


@pytest.mark.slow
def test_cue_conflict_solids(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cue = config("CueConflictSolidsDataModule", here)
    cue["data"]["init_args"] = {"image_size": 12, "train_objects": 1, "val_objects": 0, "views_per_object": 7, "batch_size": 35}
    cue["trainer"] |= {"callbacks": [{"class_path": "ShapeBias"}], "max_epochs": 1}
    Path("cue.yaml").write_text(yaml.safe_dump(cue))
    robust_pl("fit", "-c", "cue.yaml")
    robust_pl("test", "--ckpt_path", "runs/cue/checkpoints/last.ckpt")
    assert "630 samples" in capsys.readouterr().out
    assert Path("runs/cue/analysis/test/shapebias.json").is_file()


def test_timm_without_its_extra(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import timm as timm
    except Exception:
        with pytest.raises(SystemExit) as stop:
            robust_pl("test", "-c", CONFIGS / "imagenette" / "timm.yaml")
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and said.startswith(
            "robust-pl: error: cannot use robust_pl.nets.TimmModel: TimmModel needs timm"
        )
        assert "pip install robust_pl[vision]" in said
    else:
        pytest.skip("timm is installed")


@pytest.mark.slow
@needs_files
def test_imagenette_resnet(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.init_args.image_size", 24, "--data.init_args.resize", 28, "--data.init_args.eval_batch_size", 20]
    short = ["--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 1, "--trainer.limit_train_batches", 2]
    path = CONFIGS / "imagenette" / "resnet.yaml"
    robust_pl("fit", "-c", path, *small, *short, *QUIET, "--val_attacks", "{}")
    some = ["--trainer.limit_test_batches", 1, "--attacks.pgd20.init_args.steps", 2]
    robust_pl("test", "--ckpt_path", "runs/resnet/checkpoints/best.ckpt", *some)
    assert "20 samples" in capsys.readouterr().out
    assert Path("runs/resnet/analysis/test/frequencyfilter.json").is_file()
    assert Path("runs/resnet/images/robustness_curve.png").is_file() and Path("runs/resnet/test/report.md").is_file()


@pytest.mark.slow
@needs_files
def test_a_network_of_1000_classes_on_imagenette(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What configs/imagenette/timm.yaml does, with a network of our own in the place of timm's."""
    settings = yaml.safe_load((CONFIGS / "imagenette" / "timm.yaml").read_text())
    settings["model"]["init_args"]["net"] = {"class_path": "SmallCNN", "init_args": {"width": 4}}
    settings["data"]["init_args"] |= {"image_size": 24, "resize": 28, "num_workers": 0, "eval_batch_size": 20}
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    robust_pl("test", "-c", "own.yaml", "--trainer.limit_test_batches", 1, *QUIET, "--attacks.pgd20.init_args.steps", 2)
    assert "20 samples" in capsys.readouterr().out


@pytest.mark.slow
@needs_files
def test_a_damaged_image_in_one_line(robust_pl: CLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wnid in ("n01440764", "n02102040"):
        (here / "val" / wnid).mkdir(parents=True)
        for place, path in enumerate(sorted((REAL / "imagenette" / "val" / wnid).iterdir())[:3]):
            content = path.read_bytes()
            (here / "val" / wnid / f"{place}.JPEG").write_bytes(content[: len(content) // (2 if place == 1 else 1)])
    Path("own.yaml").write_text(yaml.safe_dump(config("ImageNetSubsetDataModule", here / "val")))
    with pytest.raises(SystemExit) as stop:
        robust_pl("test", "-c", "own.yaml")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "n01440764/1.JPEG cannot be read as an image" in said and "skip_damaged" in said
    with pytest.warns(UserWarning, match="skipped 2 of 6 images that cannot be read"):
        robust_pl("test", "-c", "own.yaml", "--data.init_args.skip_damaged", "true")
    assert "4 samples" in capsys.readouterr().out
