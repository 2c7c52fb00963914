"""Balances, temperatures, first losses and class errors after a resume, wherever the checkpoint was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from robust_pl.callbacks import PGD
from robust_pl.methods import ABSLD, BMTARD, MTARD, Method, MultiStep

from .test_distillation import ATTACK, QUIET, digits, net, sgd

STEPS, EPOCHS = 3, 3
FALLS: dict[str, Any] = {"optimizer": sgd, "schedule": MultiStep([1], gamma=0.1)}
BUILDS: dict[str, Callable[[], Method]] = {
    "MTARD": lambda: MTARD(net(0), net(1), net(2), PGD(**ATTACK), balance_rate=0.2, **FALLS),
    "BMTARD": lambda: BMTARD(net(0), net(1), net(2), PGD(**ATTACK), balance_rate=0.2, temperature_rate=0.1, **FALLS),
    "ABSLD": lambda: ABSLD(net(0), net(1), PGD(**ATTACK), temperature_rate=0.3, **FALLS),
}


class Saves(Callback):
    """Checkpoints where ``best.ckpt`` is written, at the end of a validation, and where ``save_every_n_steps`` writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"validated{trainer.global_step}.ckpt")


def fit(kind: str, folder: Path, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    seed_everything(0, verbose=False)
    method = BUILDS[kind]()
    limits = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(callbacks=[Saves(folder)], **limits, **{**QUIET, "devices": 1})
    trainer.fit(method, digits(batch_size=32), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


@pytest.mark.parametrize("kind", BUILDS)
def test_resumed_equals_uninterrupted(kind: str, tmp_path: Path) -> None:
    whole = fit(kind, tmp_path)
    assert not torch.equal(whole["net.linear.weight"], BUILDS[kind]().state_dict()["net.linear.weight"])
    for name in ("step1", "step2", "validated3", "step4", "validated6", "validated9"):
        resumed = fit(kind, tmp_path / "resumed", tmp_path / f"{name}.ckpt")
        assert resumed.keys() == whole.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], name


@pytest.mark.parametrize("kind", BUILDS)
def test_resumed_between_the_last_step_of_an_epoch_and_its_validation(kind: str, tmp_path: Path) -> None:
    whole = fit(kind, tmp_path)
    resumed = fit(kind, tmp_path / "resumed", tmp_path / f"step{STEPS}.ckpt")
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
