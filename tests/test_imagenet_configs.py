"""ImageNet's recipes: each is run for a step, on a thousand folders of one small picture each, with small networks in place."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from robust_pl.data.label_maps import imagenet_wnids
from robust_pl.nets import TinyClip

from .conftest import CONFIGS

RECIPES = sorted((CONFIGS / "imagenet").glob("*.yaml"))
SIZE = 32


class Small(nn.Module):
    """What timm would have built."""

    pretrained_cfg: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 4, 3, 2), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward_features(self, z: Tensor) -> Tensor:
        return self.norm(self.conv(z)).relu()

    def forward_head(self, z: Tensor, pre_logits: bool = False) -> Tensor:
        return z.mean((2, 3)) if pre_logits else self.fc(z.mean((2, 3)))

    def forward(self, z: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(z))


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collections of networks, as far as a config asks them."""

    def create_model(model_name: str, pretrained: bool = False, num_classes: int = 1000, in_chans: int = 3, **_: Any) -> Small:
        return Small(num_classes, in_chans)

    timm, clip = types.ModuleType("timm"), types.ModuleType("open_clip")
    timm.create_model = create_model  # type: ignore[attr-defined]
    tiny = TinyClip(width=4, dim=8, vocabulary=64)
    clip.create_model = lambda name, pretrained=None: tiny  # type: ignore[attr-defined]
    clip.get_tokenizer = lambda name: tiny.tokenize  # type: ignore[attr-defined]
    clip.get_model_preprocess_cfg = lambda model: {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": SIZE}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "open_clip", clip)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture a class, and the folders and files that some recipes need beside them."""
    root = tmp_path_factory.mktemp("data")
    picture = root / "picture.jpg"
    Image.effect_noise((40, 40), 60).convert("RGB").save(picture)
    for part in ("train", "val", "EDSR", "CAE", "stylized"):
        for name in imagenet_wnids():
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            (folder / "0.jpg").hardlink_to(picture)
    (root / "imagenet_classes.txt").write_text("\n".join(f"name {i}" for i in range(1000)))
    return root


def test_there_is_a_recipe_for_each_group_of_figures() -> None:
    assert len(RECIPES) == 13
    for path in RECIPES:
        text = path.read_text()
        assert "not run by us" in text and max(map(len, text.splitlines())) <= 128, path.name
        config = yaml.safe_load(text)
        data = config["data"]["init_args"]
        batch = data.get("data", {"init_args": data})["init_args"]["batch_size"]
        named = re.findall(r"8 x\s(?:# )?(\d+)", text)
        assert not named or str(batch) in named, f"{path.name} says {named} images a device and takes {batch}"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_step_of_each(
    path: Path,
    collections: None,
    imagenet: Path,
    robust_pl: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUST_PL_DATA", str(imagenet))
    config = yaml.safe_load(path.read_text())
    inner = "data.init_args." + ("data.init_args." if "data" in config["data"]["init_args"] else "")
    sizes = {"batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "val_size": 16, "image_size": SIZE, "resize": SIZE}
    short = [part for name, value in sizes.items() for part in (f"--{inner}{name}", str(value))]
    trainer = {"accelerator": "cpu", "devices": "1", "strategy": "auto", "precision": "32-true", "logger": "false"}
    short += [part for name, value in trainer.items() for part in (f"--trainer.{name}", value)]
    short += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"]
    short += ["--trainer.enable_progress_bar", "false", "--trainer.callbacks", "[]"]
    if path.stem == "dat_vit_b16":
        short += ["--model.init_args.discretizer", "IdentityDiscretizer"]
    if path.stem == "wise_ft_vit_b16":
        robust_pl("fit", "-c", path.with_name("clip_fine_tuning_vit_b16.yaml"), *short)
    robust_pl("fit", "-c", path, *short)
    saved = torch.load(f"runs/{path.stem}/checkpoints/last.ckpt", weights_only=True)
    assert all(t.isfinite().all() for t in saved["state_dict"].values())
