"""Which samples are held out for validation: drawn by the seed, or the last ones of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robust_pl.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ExtraDataMixture,
    HeldOut,
    ImageFolderDataModule,
)
from robust_pl.data.base import ImageDataModule
from robust_pl.data.images import ImagesInMemory

from .test_data_resume import SaveAt, fit_module
from .test_extra_data import write

REAL = 1437  # digits of the training set, validation samples included


@pytest.mark.parametrize("val_size", [100, 100 / REAL])
def test_the_last_samples_are_held_out_whatever_the_seed(val_size: int | float) -> None:
    for seed in (0, 1):
        data = DigitsDataModule(val_size=val_size, val_split="last", seed=seed)
        train, held = data.split
        assert torch.equal(train, torch.arange(REAL - 100)) and torch.equal(held, torch.arange(REAL - 100, REAL))
        seen = torch.cat([index for _, _, index in data.val_dataloader()])
        assert torch.equal(seen, held)
        trained = torch.cat([index for _, _, index in data.train_dataloader()])
        assert trained.max() < REAL - 100 and len(trained.unique()) == 10 * 128
    assert torch.equal(DigitsDataModule(val_size=0, val_split="last").split[0], torch.arange(REAL))
    x, y, index = next(iter(DigitsDataModule(val_size=100, val_split="last").val_dataloader()))
    digits = DigitsDataModule().train_set
    assert torch.equal(y, digits.labels[index]) and torch.equal(x, digits.images[index].float() / 16)


class Blank(CIFAR10DataModule):
    def load_train(self) -> ImagesInMemory:
        return ImagesInMemory(torch.zeros(50_000, 3, 1, 1, dtype=torch.uint8), torch.zeros(50_000))


def test_that_of_the_protocol() -> None:
    train, held = Blank(val_size=1_000, val_split="last").split
    assert torch.equal(train, torch.arange(49_000)) and torch.equal(held, torch.arange(49_000, 50_000))
    # 383 steps an epoch, none dropped.
    assert len(Blank(val_size=1_000, val_split="last", drop_last=False).train_dataloader()) == 383


def test_random_ones_are_those_of_before() -> None:
    assert all(
        torch.equal(a, b) for a, b in zip(DigitsDataModule().split, DigitsDataModule(val_split="random").split, strict=True)
    )
    assert DigitsDataModule().split[1][:4].tolist() == [0, 11, 56, 69]


@pytest.mark.parametrize("cls", [CIFAR10DataModule, CIFAR100DataModule, DigitsDataModule, ImageFolderDataModule])
def test_every_set_takes_it_and_keeps_it_in_its_checkpoints(cls: Any) -> None:
    data: ImageDataModule = cls(val_split="last")
    assert data.val_split == "last" and data.hparams["val_split"] == "last" and cls().val_split == "random"
    with pytest.raises(ValueError, match="val_split='first' is unknown: choose one of random, last"):
        cls(val_split="first")


def test_mixtures_hold_out_what_their_real_data_do(tmp_path: Path) -> None:
    data = ExtraDataMixture(DigitsDataModule(batch_size=60, val_size=100, val_split="last"), str(write(tmp_path)))
    assert data.val_split == "last" and torch.equal(data.split[1], torch.arange(REAL - 100, REAL))
    trained = torch.cat([index for _, _, index in data.train_dataloader()])
    real = trained[trained < REAL]
    assert len(real) and real.max() < REAL - 100


def test_held_out_samples_are_parted_in_either_way() -> None:
    inner = {"val_size": 100, "val_split": "last"}
    learn, select = HeldOut(DigitsDataModule(**inner), val_size=40).split
    assert torch.equal(torch.cat([learn, select]).sort().values, torch.arange(REAL - 100, REAL))
    assert not torch.equal(select, torch.arange(REAL - 40, REAL))
    learn, select = HeldOut(DigitsDataModule(**inner), val_size=40, val_split="last").split
    assert torch.equal(learn, torch.arange(REAL - 100, REAL - 40)) and torch.equal(select, torch.arange(REAL - 40, REAL))
    drawn = DigitsDataModule(val_size=100, seed=3).split[1]
    learn, select = HeldOut(DigitsDataModule(val_size=100), val_size=40, val_split="last", seed=3).split
    assert torch.equal(learn, drawn[:60]) and torch.equal(select, drawn[60:])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_goes_on_in_an_epoch_with_its_own_split_alone(tmp_path: Path, mixed: bool) -> None:
    def data(val_split: Any) -> ImageDataModule:
        digits = DigitsDataModule(batch_size=60, val_size=100, val_split=val_split)
        return ExtraDataMixture(digits, str(write(tmp_path)), 0.5) if mixed else digits

    whole = fit_module(tmp_path, data("last"), max_epochs=2)
    saver = SaveAt(tmp_path)
    fit_module(tmp_path, data("last"), callbacks=[saver], max_epochs=2)
    path, done = saver.saved["batch5"]
    assert fit_module(tmp_path, data("last"), path, max_epochs=2).seen == whole.seen[done:]
    with pytest.raises(ValueError, match="held other samples out, and cannot resume: use the same val_split"):
        fit_module(tmp_path, data("random"), path, max_epochs=2)


def test_a_checkpoint_that_does_not_say_is_believed() -> None:
    loader = DigitsDataModule(batch_size=60).train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    expected = next(iterator)[2]
    del state["samples"]
    later = DigitsDataModule(batch_size=60).train_dataloader()
    later.load_state_dict(state)
    assert torch.equal(next(iter(later))[2], expected)
