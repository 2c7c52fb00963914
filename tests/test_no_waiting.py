"""No training step reads from the device, so that the host prepares the next one while the device still works on this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from robust_pl.callbacks import AWP, EMA, MARWP, PGD, RWP, SAM, SWA, Attack, FriendlySAM, ProgressBar, progress
from robust_pl.data import (
    PRIME,
    APRPair,
    APRSingle,
    Augmentation,
    AugMixChains,
    CropAndFlip,
    CutMix,
    Cutout,
    Diffeomorphism,
    DigitsDataModule,
    LabelSmoothing,
    Noise2Net,
    PixelAdaIN,
    RandAugment,
)
from robust_pl.data.augmentations import augmented
from robust_pl.methods import PGDAT

from .method_table import EPS, METHODS, Case, net, sgd
from .waits import watching

CHEAP = ("StandardTraining", "PGDAT", "TRADES", "MART", "FastAT", "NFGSM", "NuAT", "LIET")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WAITS = {
    "NuAT": "_linalg_svd in nuclear_distance",  # torch looks whether singular values converged
    "AdvMoE": "tolist in __init__ (experts.py",  # the sizes of the blocks of images that share an expert
}
"""Methods that cannot do without, and where they wait."""
ON_THE_CPU = ("_where (mixed_chains.py", "raise_if_stray (per_sample.py")
"""Places that look only where that costs nothing."""


class Watched(Callback):
    """Looks at all batches but an epoch's first, from the first callback that hears of one until the last."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.batches = 0
        self._open = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            self._now = self._open.enter_context(watching(pl_module.device.type))

    def close(self) -> None:
        """Look no more, and keep what was seen."""
        self._open.close()
        self.seen += self.__dict__.pop("_now", [])


class Ends(Callback):
    """The last callback."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watched.close()
        self.watched.batches += batch_idx > 0

    def on_exception(self, *_: Any) -> None:
        self.watched.close()


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods let an attack look at values where that costs nothing."""
    run = Attack.run

    def runs(attack: Attack, *arguments: Any, **named: Any) -> Any:
        return run(attack, *arguments, **{**named, "careful": False} if "careful" in named else named)

    monkeypatch.setattr(Attack, "run", runs)


def waits_of(case: Case, callbacks: list[Callback], folder: Path, root: Path, device: str, bar: bool = False) -> set[str]:
    watched = Watched()
    seed_everything(0, verbose=False)
    method = case.build(sgd, folder)
    quiet = {"logger": False, "enable_progress_bar": bar, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator=device,
        devices=1,
        callbacks=[watched, *callbacks, Ends(watched)],
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=0,
        default_root_dir=root,
        **quiet,
    )
    trainer.fit(method, DigitsDataModule(batch_size=8, eval_batch_size=32))
    assert watched.batches == 4
    return {place for place in watched.seen if not any(on_cpu in place for on_cpu in ON_THE_CPU)}


def every_method() -> Iterator[Any]:
    for name, case in METHODS.items():
        if case.trains:
            yield pytest.param(name, marks=[] if name in CHEAP else pytest.mark.slow)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(every_method()))
def test_no_method_waits(name: str, device: str, ingredients: Path, tmp_path: Path) -> None:
    """With a perturbation and an average, if it takes them."""
    case = METHODS[name]
    refuses = case.refuses or {}
    callbacks: list[Callback] = [make for kind, make in (("AWP", AWP(0.01)), ("EMA", EMA(0.9))) if kind not in refuses]
    seen = waits_of(case, callbacks, ingredients, tmp_path, device)
    known = WAITS.get(name)
    if known is None:
        assert not seen, "\n".join(sorted(seen))
    else:
        assert seen, f"{name} waits no more: take it out of the list"
        assert all(known in place or device == "cuda" for place in seen), "\n".join(sorted(seen))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [lambda: SAM(0.05), lambda: FriendlySAM(0.05), lambda: RWP(0.01), lambda: MARWP(0.01), SWA])
def test_no_weight_callback_waits(make: Callable[[], Callback], device: str, ingredients: Path, tmp_path: Path) -> None:
    assert not waits_of(METHODS["PGDAT"], [make()], ingredients, tmp_path, device)


@pytest.mark.parametrize("device", DEVICES)
def test_friendly_training_does_not_wait_for_what_is_broken(device: str, ingredients: Path, tmp_path: Path) -> None:
    case = Case(lambda optimizer, _: PGDAT(net(), PGD(EPS, steps=3, keep="first"), optimizer))
    assert not waits_of(case, [], ingredients, tmp_path, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("hurry", "waits"), [(0.01, False), (1.0, True)])
def test_the_progress_bar_reads_the_loss_now_and_then(
    hurry: float, waits: bool, device: str, ingredients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in every step; the first one is not looked at."""
    clock = count(step=hurry)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert bool(waits_of(METHODS["PGDAT"], [ProgressBar()], ingredients, tmp_path, device, bar=True)) == waits


AUGMENTATIONS = [
    CropAndFlip(1),
    Cutout(3),
    CutMix(),
    LabelSmoothing(0.1),
    RandAugment(),
    APRPair(),
    APRSingle(),
    AugMixChains(),
    PRIME(),
    Diffeomorphism(),
    Noise2Net(),
    PixelAdaIN(),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda one: type(one).__name__)
def test_no_augmentation_waits(augmentation: Augmentation, device: str) -> None:
    x, y = torch.rand(8, 3, 16, 16).to(device), (torch.arange(8) % 5).to(device)
    batch = (x, y, torch.arange(8).to(device))
    augmented(batch, [augmentation], 10, 0, 0)  # what is made once
    with watching(device) as seen:
        augmented(batch, [augmentation], 10, 0, 1)
    assert not [place for place in seen if not any(on_cpu in place for on_cpu in ON_THE_CPU)]


# What would not be found, if the watch did not work ------------------------------------------------------------------


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.cpu().numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.repeat_interleave((x > 0).long()),
        lambda x: torch.linalg.svdvals(x.view(2, 3)),
        lambda x: torch.linalg.eigvalsh(x.view(2, 3) @ x.view(3, 2)),
        lambda x: nn.functional.one_hot((x > 0).long()),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor(3.0, device=x.device),
        lambda x: x[[0, 2]],
        lambda x: x.clone().__setitem__(x > 0, x[:3] + 1),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_what_waits_is_seen(reads: Callable[[Tensor], Any], device: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0], device=device)
    with watching(device) as seen:
        reads(x)
    assert seen


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: torch.where(x > 0, x, 0.0).sum(),
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: x.clone().__setitem__(x > 0, 1.0),
        lambda x: x[x.argsort()][1:3],
        lambda x: nn.functional.one_hot((x > 0).long(), 3),
        lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2.0, device=x.device),
        lambda x: torch.as_tensor(x),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_wait_is_let_pass(asks: Callable[[Tensor], Any], device: str) -> None:
    x = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0], device=device)
    asks(x)
    with watching(device) as seen:
        asks(x)
    assert not seen
