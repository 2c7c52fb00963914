"""Tiny objects and pictures to train on, for the tests of methods that render views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from robust_pl.callbacks import GMVFool
from robust_pl.data import ImageDataModule
from robust_pl.data.images import ImagesInMemory
from robust_pl.methods import VIAT, Method
from robust_pl.nets import SmallCNN
from robust_pl.scenes import SceneSet, ViewSpace

from .view_landscape import PosePhoto

SPACE = ViewSpace(phi=(0, 80))
LABELS = [0, 2, 0, 1, 0, 2]
BATCH, STEPS, RENDERS = 4, 3, 5


class Photos(ImageDataModule):
    """Twelve random pictures of 2 x 2 pixels, and six objects of three classes whose images are the pose."""

    class_names = ["a", "b", "c"]  # noqa: RUF012
    image_shape = (3, 2, 2)
    view_space = SPACE

    def __init__(self, scenes: SceneSet | None = None, batch_size: int = BATCH, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, val_size=0, seed=seed)
        if scenes is None:
            scenes = SceneSet([PosePhoto(f"photo {i}") for i in range(len(LABELS))], LABELS, [f"thing/{i}" for i in range(6)])
        self.train_scenes = scenes

    def load_train(self) -> ImagesInMemory:
        pixels = torch.randint(0, 256, (BATCH * STEPS, 3, 2, 2), generator=torch.Generator().manual_seed(1))
        return ImagesInMemory(pixels.to(torch.uint8), torch.arange(len(pixels)) % 3)

    load_test = load_train


def search(**more: Any) -> GMVFool:
    return GMVFool(2, **{"popsize": 7, "iterations": 3, "chunk": 2, **more})


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def still(params: Any) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(params, lr=0.0)


def viat(net: nn.Module | None = None, **more: Any) -> VIAT:
    settings = {"search": search(), "renders": RENDERS, "warm_iterations": 2, "optimizer": sgd, "num_classes": 3}
    seed_everything(0, verbose=False)
    return VIAT(SmallCNN(3, 3, 2) if net is None else net, **{**settings, **more})


def trainer_in(folder: Path, **more: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**{**settings, **quiet, **more})


def fit(method: Method, folder: Path, data: ImageDataModule | None = None, ckpt_path: Any = None, **more: Any) -> Trainer:
    trainer = trainer_in(folder, **more)
    weights_only = None if ckpt_path is None else True
    trainer.fit(method, data or Photos(), ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer
