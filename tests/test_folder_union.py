"""Image folders with further ones: what an epoch and a batch hold, whose labels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from robust_pl.data import DigitsDataModule, FolderUnion, ImageFolderDataModule
from robust_pl.methods import StandardTraining
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, sgd

REAL, MORE = 20, 12


def write(root: Path, classes: tuple[str, ...], count: int, red: int) -> None:
    """Flat images whose red says where they are from, and green which class they show."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 12), (red, 100 * label, 10 * i)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write(root / "train", ("cat", "dog"), REAL // 2, red=0)
    write(root / "val", ("cat", "dog"), 3, red=0)
    write(root / "edsr", ("cat", "dog"), 4, red=128)
    write(root / "cae", ("cat",), 4, red=255)
    write(root / "birds", ("bird",), 1, red=0)
    return root


def union(root: Path, more: tuple[str, ...] = ("edsr", "cae"), fraction: float | None = None, **data: object) -> FolderUnion:
    settings = {"batch_size": 5, "val_size": 4, "num_workers": 0, "image_size": 8, "resize": 10, **data}
    return FolderUnion(ImageFolderDataModule(str(root), **settings), list(more), fraction)


def epoch_of(data: FolderUnion) -> list[tuple[torch.Tensor, ...]]:
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return list(loader)


def check(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> None:
    """Labels are those of the folders, and the index says which folder that is."""
    red, green = (x[:, channel].amax((1, 2)).mul(255).round().long() for channel in (0, 1))
    assert torch.equal(green, 100 * y)
    source = (index >= REAL).long() + (index >= REAL + 8)
    assert torch.equal(red, torch.tensor([0, 128, 255])[source])


def test_an_epoch_sees_every_image_of_all_folders_once(root: Path) -> None:
    data = union(root, drop_last=False)
    x, y, index = (torch.cat(column) for column in zip(*epoch_of(data), strict=True))
    check(x, y, index)
    held_out = data.split[1]
    assert len(held_out) == 4 and (held_out < REAL).all()
    assert sorted([*index.tolist(), *held_out.tolist()]) == list(range(REAL + MORE))
    assert index.tolist() != sorted(index.tolist())
    assert [len(loader) for loader in (data.val_dataloader(), data.test_dataloader())] == [1, 2]


def test_a_batch_holds_its_share(root: Path) -> None:
    batches = epoch_of(union(root, fraction=0.4))
    assert len(batches) == 4 and all(len(x) == 5 and (index >= REAL).sum() == 2 for x, _, index in batches)
    for batch in batches:
        check(*batch)


def test_a_run_goes_through_the_union(root: Path) -> None:
    method = StandardTraining(SmallCNN(2, 3, width=4), optimizer=sgd, num_classes=2)
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(method, union(root))
    assert trainer.global_step == 2 * ((REAL - 4 + MORE) // 5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda root: FolderUnion(DigitsDataModule(), ["x"]), TypeError, "data is a DigitsDataModule: FolderUnion takes"),
        (lambda root: union(root, ()), ValueError, "more is empty: name a folder"),
        (lambda root: union(root, fraction=1.5), ValueError, "fraction=1.5 is a share of further images"),
        (lambda root: union(root, ("birds",)).more_set, ValueError, "classes that the training folder has not: bird"),
        (
            lambda root: union(root, ("nowhere",)).more_set,
            FileNotFoundError,
            "nowhere does not exist or holds",
        ),
    ],
)
def test_bad_arguments(build: Callable[[Path], object], error: type[Exception], message: str, root: Path) -> None:
    with pytest.raises(error, match=message):
        build(root)
