"""wandb without an account, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image

from robust_pl.callbacks.analysis.image_grid import grid


def test_wandb_is_offline_and_a_resumed_fit_continues_its_run(
    robust_pl: Callable[..., None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    names = ("--run.group", "digits", "--run.tags", "[first, small]", "--run.name", "tracked")
    robust_pl(
        "fit", "-c", tiny, "--trainer.logger", "true", "--trainer.max_epochs", 1, *names, "--model.init_args.schedule", "null"
    )
    run = wandb.run
    assert run is not None and run.settings.mode in ("offline", "dryrun")
    first = run.id
    assert (run.name, run.group, run.tags) == ("tracked", "digits", ("first", "small"))
    assert run.config["config"]["model"]["init_args"]["attack"]["init_args"]["steps"] == 2
    assert run.config["config"]["seed_everything"] == 0
    assert run.config["versions"]["torch"] == torch.__version__
    wandb.finish()
    folder = Path("runs/tracked")
    assert json.loads((folder / "run.json").read_text())["wandb_id"] == first
    offline = list((folder / "wandb").glob(f"offline-run-*-{first}"))
    assert len(offline) == 1
    assert list(offline[0].rglob("*.png")), "the grid of images is in the run"

    robust_pl("fit", "--ckpt_path", folder / "checkpoints/last.ckpt", "--trainer.max_epochs", 2)
    assert wandb.run is not None and wandb.run.id == first
    wandb.finish()
    assert not Path("wandb").exists()


def test_grid_shows_clean_adversarial_and_magnified_difference() -> None:
    x = torch.full((2, 1, 8, 8), 0.5)
    x_adv = x.clone()
    x_adv[0] += 0.1
    x_adv[1, :, :4] -= 0.05
    captions = [[("1", True), ("2", False)]] * 3
    pixels = np.asarray(grid(x, x_adv, captions)).astype(int)
    centre = [(6 + row * 118 + 48, 110 + column * 102 + 48) for row in range(3) for column in range(2)]
    clean, _, adversarial, _, up, _ = (pixels[place][0] for place in centre)
    assert (clean, adversarial, up) == (128, 153, 255)
    assert pixels[6 + 2 * 118 + 10, 110 + 102 + 48][0] == pytest.approx(64, abs=1), "half of the largest, downwards"
    red = (pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 80)
    assert red[:, 110 + 102 :].any() and not red[:, 110 : 110 + 102].any()


def test_images_are_saved_as_png(robust_pl: Callable[..., None], tiny: Path) -> None:
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    for attack in ("fgsm", "pgd"):
        with Image.open(f"runs/tiny/images/val_epoch000_{attack}.png") as picture:
            assert picture.size == (110 + 8 * 102, 3 * 118 + 6)
