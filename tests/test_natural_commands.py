"""Training for natural robustness on the command line, and what it says where weights are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import CONFIGS

CLI = Callable[..., None]
SHORT = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3, "--trainer.enable_progress_bar", "false")


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROBUST_PL_DATA", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["augmax", "dat"])
def test_fit_and_test(robust_pl: CLI, name: str) -> None:
    robust_pl("fit", "-c", CONFIGS / f"digits/{name}.yaml", "--run.name", name, *SHORT)
    best = Path(f"runs/{name}/checkpoints/best.ckpt")
    stored = torch.load(best, weights_only=True)["state_dict"]
    assert not any("discretizer" in key for key in stored)
    robust_pl("test", "--ckpt_path", best, "--trainer.limit_test_batches", 1)
    report = json.loads(next(Path(f"runs/{name}/test").glob("*.json")).read_text())
    assert report


@pytest.mark.slow
def test_augmentations_in_a_list(robust_pl: CLI) -> None:
    Path("augment.yaml").write_text(
        "data:\n  init_args:\n    augment:\n"
        "      - {class_path: Noise2Net, init_args: {hidden: 4}}\n"
        "      - {class_path: PixelAdaIN, init_args: {style_label: 0.2}}\n"
        "      - {class_path: DistortedNet, init_args: {net: {class_path: torch.nn.Conv2d, init_args: "
        "{in_channels: 1, out_channels: 1, kernel_size: 3, padding: 1}}}}\n"
    )
    robust_pl("fit", "-c", CONFIGS / "digits/standard.yaml", "-c", "augment.yaml", "--run.name", "augmented", *SHORT)
    assert Path("runs/augmented/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "data:\n  init_args:\n    augment:\n"
            "      - {class_path: Stylize, init_args: {encoder: vgg_normalised.pth, decoder: decoder.pth}}\n",
            "no file of weights at vgg_normalised.pth",
        ),
        (
            "model:\n  class_path: DAT\n  init_args:\n"
            "    discretizer: {class_path: VQGAN, init_args: {weights: vqgan.ckpt, channels: 32, codes: 16}}\n",
            "no file of weights at vqgan.ckpt",
        ),
    ],
)
def test_missing_weights_are_one_sentence(
    robust_pl: CLI, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more.yaml").write_text(config)
    with pytest.raises(SystemExit) as stop:
        robust_pl("fit", "-c", CONFIGS / "digits/standard.yaml", "-c", "more.yaml", *SHORT)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("robust-pl: error")]
    assert len(said) == 1 and message in said[0]
