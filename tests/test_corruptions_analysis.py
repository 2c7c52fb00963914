"""The analysis under corruptions: its figures, published files, baselines, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robust_pl.callbacks import Corruptions
from robust_pl.data import CIFAR10CDataModule, CIFAR100CDataModule, ImageFolderDataModule, ImageNetCDataModule
from robust_pl.data.imagenet_c import ImageNetCFiles
from robust_pl.functional.corruption_error import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    corruption_errors,
    relative_corruption_errors,
)
from robust_pl.functional.corruptions import BENCHMARK, CORRUPTIONS, corrupt

from .conftest import CONFIGS
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process

CLI = Callable[..., None]
N = 8
CONFIG = """
model:
  class_path: StandardTraining
  init_args:
    net:
      class_path: SmallCNN
      init_args: {width: 4}
data:
  class_path: ImageFolderDataModule
  init_args: {data_dir: pictures, image_size: 32, resize: 32, eval_batch_size: 3, num_workers: 0, augment: false}
trainer:
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class Brightness(nn.Module):
    """Class 1 is what is brighter than 0.4."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.full_like(mean, 0.4), mean], 1)


def pictures(size: int = 32) -> tuple[Tensor, Tensor]:
    grey = torch.linspace(0.1, 0.9, N).view(N, 1, 1, 1)
    texture = torch.rand(N, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = ((grey + 0.1 * (texture - 0.5)) * 255).round() / 255
    return x, (x.mean((1, 2, 3)) > 0.4).long()


def pixels(x: Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_cifar_c(folder: Path, corruptions: tuple[str, ...], severities: int = 5) -> Path:
    """As CIFAR-10-C is published, of eight images; what is generated is what is in the files."""
    folder.mkdir(parents=True)
    x, y = pictures()
    np.save(folder / "labels.npy", y.repeat(5).numpy().astype(np.uint8))
    for name in corruptions:
        parts = [pixels(corrupt(x, name, severity, torch.arange(N))) for severity in range(1, 1 + severities)]
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    return folder


def write_folders(folder: Path, size: int = 32, classes: tuple[str, str] = ("dark", "light")) -> Path:
    """Images in ImageNet's layout, as PNG."""
    x, y = pictures(size)
    for part in ("train", "val"):
        write_classes(folder / part, x, y, classes)
    return folder


def write_classes(folder: Path, x: Tensor, y: Tensor, classes: tuple[str, str] = ("dark", "light")) -> None:
    for i, image in enumerate(pixels(x)):
        (folder / classes[y[i]]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / classes[y[i]] / f"{i}.png")


# Arithmetic ------------------------------------------------------------------------------------------------------------


def test_corruption_errors_by_hand() -> None:
    errors, baseline = {"fog": [0.2, 0.4], "snow": [0.3, 0.3]}, {"fog": 0.6, "snow": 0.4}
    assert corruption_errors(errors, baseline) == pytest.approx({"fog": 0.5, "snow": 0.75})
    # (0.3 - 0.1) / (0.6 - 0.2) and (0.3 - 0.1) / (0.4 - 0.2)
    assert relative_corruption_errors(errors, 0.1, baseline, 0.2) == pytest.approx({"fog": 0.5, "snow": 1.0})
    assert corruption_errors(errors, {"fog": 0.0, "snow": 0.4}) == pytest.approx({"snow": 0.75})
    assert relative_corruption_errors(errors, 0.1, baseline, 0.5) == pytest.approx({"fog": 2.0})


def test_alexnet_is_its_own_measure() -> None:
    assert tuple(ALEXNET_ERRORS) == BENCHMARK
    own = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    for found in (
        corruption_errors(own, ALEXNET_ERRORS),
        relative_corruption_errors(own, ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS, ALEXNET_CLEAN_ERROR),
    ):
        assert list(found.values()) == pytest.approx([1.0] * 15)
    assert sum(ALEXNET_ERRORS.values()) == pytest.approx(11.834896)


# The analysis ----------------------------------------------------------------------------------------------------------


def test_figures_are_accuracies_of_what_corrupt_makes() -> None:
    x, y = pictures()
    batches = [(x[i], y[i], torch.tensor(i)) for i in ([0, 1, 2, 3, 4], [7, 5, 6])]
    record = Corruptions(["brightness", "contrast", "saturate"], severities=[1, 5])(Brightness(), batches)
    wanted = [
        [
            (Brightness()(corrupt(x, name, severity, torch.arange(N))).argmax(1) == y).double().mean().item()
            for severity in (1, 5)
        ]
        for name in ("brightness", "contrast", "saturate")
    ]
    assert record.maps[0].values == wanted and record.maps[0].x == [1, 5]
    assert wanted[0][1] < 1.0  # brightened dark images are taken for light ones
    assert record.figures["clean"] == 1.0
    assert record.figures["mean"] == pytest.approx(np.mean(wanted[:2]))
    assert record.figures["mean_extra"] == record.figures["saturate"] == pytest.approx(np.mean(wanted[2]))
    assert record.figures["worst"] == pytest.approx(min(map(np.mean, wanted)))
    assert record.about["forwards_per_sample"] == 7 and record.about["parameters"] == "cifar"
    assert "mce" not in record.figures and "on the fly" in record.notes[0]


def test_mce_against_alexnet_needs_the_whole_benchmark_and_its_parameters() -> None:
    x, y = pictures()
    record = Corruptions("benchmark", table="imagenet")(Brightness(), [(x, y)])
    errors = {name: 1 - record.figures[name] for name in BENCHMARK}
    assert record.figures["mce"] == pytest.approx(np.mean([errors[name] / ALEXNET_ERRORS[name] for name in BENCHMARK]))
    growth = [errors[name] / (ALEXNET_ERRORS[name] - ALEXNET_CLEAN_ERROR) for name in BENCHMARK]
    assert record.figures["relative_mce"] == pytest.approx(np.mean(growth))
    assert any("reconstructed" in note and "43.48" in note for note in record.notes)
    assert any("these images are of 2" in note for note in record.notes)
    assert any("these have 32 x 32" in note for note in record.notes)
    sheet = record.sheets[1]
    assert sheet.columns[-2:] == ["CE", "relative CE"] and sheet.rows[-1][0] == "mean"
    partial = Corruptions(["fog", "frost"], table="imagenet", samples=2)(Brightness(), [(x, y)])
    assert "mce" not in partial.figures


def test_mce_against_another_run(tmp_path: Path) -> None:
    x, y = pictures()
    settings = {"corruptions": ["brightness", "contrast"], "severities": [4, 5]}
    other = Corruptions(**settings)(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), [(x, y)])
    path = tmp_path / "corruptions.json"
    path.write_text(other.as_json())
    record = Corruptions(**settings, reference=str(path))(Brightness(), [(x, y)])
    wanted = np.mean([(1 - record.figures[name]) / (1 - other.figures[name]) for name in settings["corruptions"]])
    assert record.figures["mce"] == pytest.approx(wanted)
    assert str(path) in record.notes[-1] and "8 samples" in record.notes[-1]
    same = Corruptions(**settings, reference=str(path))
    with pytest.raises(ValueError, match="lacks fog at severity 4"):
        Corruptions(["fog"], [4], reference=str(path))(Brightness(), [(x, y)])
    path.write_text(other.as_json().replace('"Corruptions"', '"Other"', 1))
    with pytest.raises(ValueError, match="is a record of Other, not of Corruptions"):
        same(Brightness(), [(x, y)])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"reference=.* does not exist"):
        same(Brightness(), [(x, y)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"corruptions": ["rain"]}, "corruption 'rain' is unknown"),
        ({"corruptions": "most"}, "corruptions='most' must be benchmark, extra, all"),
        ({"corruptions": []}, "must name at least one"),
        ({"severities": [0]}, "severity=0 must be one of"),
        ({"severities": [1, 1]}, "each once"),
        ({"table": "mnist"}, "table='mnist' is unknown"),
        ({"table": "cifar", "files": "x"}, "table=cifar has no effect on files=x"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Corruptions(**arguments)  # type: ignore[arg-type]


def test_all_and_extra() -> None:
    assert Corruptions("all").corruptions == list(CORRUPTIONS) and len(Corruptions("extra").corruptions) == 4


# Published files -------------------------------------------------------------------------------------------------------


def test_cifar_c_files_give_what_generating_gives(tmp_path: Path) -> None:
    files = write_cifar_c(tmp_path / "CIFAR-10-C", ("brightness", "contrast"))
    x, y = pictures()
    batches = [(x[i], y[i], torch.tensor(i)) for i in ([3, 1, 0, 2], [6, 7, 4, 5])]
    read, made = (Corruptions(["brightness", "contrast"], files=where)(Brightness(), batches) for where in (str(files), None))
    assert read.maps == made.maps and not read.notes and read.about["images"] == str(files)
    data = CIFAR10CDataModule("brightness", 5, data_dir=str(tmp_path))
    images, labels = data.test_set.read(torch.arange(N), None)
    assert torch.equal(images, corrupt(x, "brightness", 5, torch.arange(N))) and torch.equal(labels, y)
    assert data.num_classes == 10 and CIFAR100CDataModule("fog", 1).num_classes == 100
    with pytest.raises(ValueError, match="CIFAR-10-C is a test set and nothing to train"):
        data.setup("fit")


def test_cifar_c_files_that_do_not_fit(tmp_path: Path) -> None:
    files = write_cifar_c(tmp_path / "files", ("fog", "contrast"), severities=3)
    x, y = pictures()

    def look(y: Tensor = y, **more: object) -> None:
        Corruptions(**{"corruptions": ["fog"], "severities": [1], "files": str(files), **more})(Brightness(), [(x, y)])  # type: ignore[arg-type]

    look()
    with pytest.raises(ValueError, match=r"fog\.npy holds 24 images.*severity 4 is missing"):
        look(severities=[1, 4])
    with pytest.raises(FileNotFoundError, match=r"frost\.npy does not exist"):
        look(corruptions=["frost"])
    with pytest.raises(ValueError, match="has class 1 for image 7, and the test set 0"):
        look(torch.cat([y[:-1], torch.tensor([0])]))
    with pytest.raises(ValueError, match="holds 8 images of each severity, and the test set more"):
        Corruptions(["fog"], [1], files=str(files))(Brightness(), [(x, y, torch.arange(N) + 1)])
    np.save(files / "fog.npy", np.zeros((48, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"fog\.npy holds 48 images and .*labels\.npy 40 classes"):
        look()
    np.save(files / "fog.npy", np.zeros((40, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"fog\.npy must hold colour images of 32 x 32 pixels.*\(40, 64, 64, 3\)"):
        look()
    (files / "fog.npy").write_bytes((files / "contrast.npy").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"fog\.npy is cut short"):
        look()
    (files / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npy does not exist"):
        look()
    with pytest.raises(FileNotFoundError, match=r"files=.*nowhere is not a folder"):
        look(files=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found by the names of image files"):
        look(files=str(tmp_path / "empty"))


def test_imagenet_c_files_are_found_by_name(tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(write_folders(tmp_path / "pictures")), image_size=32, resize=32, eval_batch_size=3)
    clean, labels = data.test_set.read(torch.arange(N), None)
    for severity in (1, 2):
        write_classes(
            tmp_path / "c" / "contrast" / str(severity), corrupt(clean, "contrast", severity, torch.arange(N)), labels
        )
    analysis = Corruptions(["contrast"], [1, 2], files=str(tmp_path / "c"))
    analysis.begin(Brightness(), data)
    read = analysis._corrupted(clean[3:6], labels[3:6], "contrast", 2, torch.arange(3, 6))
    assert torch.equal(read, corrupt(clean, "contrast", 2, torch.arange(N))[3:6])
    with pytest.raises(FileNotFoundError, match="severity 3 of contrast is missing"):
        Corruptions(["contrast"], [3], files=str(tmp_path / "c")).begin(Brightness(), data)
    with pytest.raises(FileNotFoundError, match="so fog is missing"):
        Corruptions(["fog"], [1], files=str(tmp_path / "c")).begin(Brightness(), data)
    first = next((tmp_path / "c" / "contrast" / "1" / "dark").iterdir())
    files = ImageNetCFiles(tmp_path / "c", ["contrast"], [1], [f"dark/{first.name}"], torch.zeros(1, dtype=torch.int64), 32)
    Image.new("RGB", (40, 32)).save(first)
    with pytest.raises(ValueError, match="is an image of 40 x 32 pixels, not 32 x 32"):
        files.read("contrast", 1, torch.tensor([0]))
    first.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        files.read("contrast", 1, torch.tensor([0]))
    first.unlink()
    with pytest.raises(FileNotFoundError, match="unpack ImageNet-C again"):
        files.read("contrast", 1, torch.tensor([0]))


def test_imagenet_c_as_a_data_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wnids = ("n01440764", "n01443537")
    x, y = pictures(224)
    write_classes(tmp_path / "ImageNet-C" / "fog" / "2", x, y, wnids)
    data = ImageNetCDataModule("fog", 2, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="lacks 998 of the 1000 class folders of ImageNet-C"):
        data.load_test()
    monkeypatch.setattr("robust_pl.data.imagenet_c.imagenet_wnids", lambda: wnids)
    data = ImageNetCDataModule("fog", 2, data_dir=str(tmp_path))
    images, labels = data.test_set.read(torch.arange(N), None)
    order = torch.tensor([int(name.split(b"/")[1].split(b".")[0]) for name in data.test_set.names])  # type: ignore[attr-defined]
    assert torch.equal(images, x[order]) and torch.equal(labels, y[order])
    with pytest.raises(FileNotFoundError, match="severity 3 of fog is missing"):
        ImageNetCDataModule("fog", 3, data_dir=str(tmp_path)).load_test()
    with pytest.raises(ValueError, match="severity=7"):
        ImageNetCDataModule("fog", 7)


# The command line ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_command_line_stopped_and_on_two_processes(
    robust_pl: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "pictures")
    Path("tiny.yaml").write_text(CONFIG)
    command = ["test", "-c", "tiny.yaml", "-c", CONFIGS / "analysis/corruptions.yaml"]
    robust_pl(*command, "--run.name", "whole")
    whole = json.loads(Path("runs/whole/analysis/test/corruptions.json").read_text())
    assert len(whole["maps"][0]["values"]) == 15 and whole["about"]["samples"] == N
    assert Path("runs/whole/analysis/test/corruptions.png").stat().st_size > 1000

    real, calls = Corruptions.look, []

    def stops(self: Corruptions, *arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Corruptions, "look", stops)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            robust_pl(*command, "--run.name", "stopped")
    robust_pl(*command, "--run.name", "stopped")
    robust_pl_process(tmp_path, *map(str, command), "--run.name", "two", *DDP, "2")
    for name in ("stopped", "two"):
        found = json.loads(Path(f"runs/{name}/analysis/test/corruptions.json").read_text())
        assert found["maps"] == whole["maps"] and found["figures"] == whole["figures"], name
    capsys.readouterr()
    with pytest.raises(SystemExit):
        robust_pl("test", "-c", "tiny.yaml", "--data", "DigitsDataModule", "--trainer.callbacks+=Corruptions")
    assert "Corruptions needs colour images, and DigitsDataModule has images of 1 channels" in capsys.readouterr().err
