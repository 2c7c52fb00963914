"""Sets that live on the training device: the batches are those of the host, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robust_pl.data import AsUsual, CutMix, Cutout, DigitsDataModule, ExtraDataMixture, HeldOut
from robust_pl.data.augment import crop_and_flip
from robust_pl.data.augmentations import CropAndFlip, augmented
from robust_pl.data.base import ImageDataModule
from robust_pl.data.images import Images, ImagesInMemory
from robust_pl.data.resident import Residence, ResidentImages

from .test_data import Plain
from .test_data_resume import SaveAt, fit_module

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


class Colours(ImageDataModule):
    """Random pixels in three channels, augmented as on CIFAR."""

    class_names = [str(label) for label in range(10)]  # noqa: RUF012
    image_shape = (3, 12, 12)

    def load_train(self) -> ImagesInMemory:
        draws = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (300, *self.image_shape), generator=draws, dtype=torch.uint8)
        return ImagesInMemory(pixels, torch.randint(10, (300,), generator=draws), crop_and_flip)

    def load_test(self) -> ImagesInMemory:
        return self.load_train()


def extra(folder: Path) -> ExtraDataMixture:
    pixels = np.random.default_rng(0).integers(256, size=(200, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "extra.npz", image=pixels, label=np.arange(200) % 10)
    return ExtraDataMixture(Colours(batch_size=40), str(folder / "extra.npz"), 0.7)


MODULES: dict[str, Callable[[Path], ImageDataModule]] = {
    "colours": lambda _: Colours(batch_size=32),
    "last batch kept": lambda _: Colours(batch_size=32, drop_last=False, val_size=7),
    "digits": lambda _: DigitsDataModule(batch_size=100, augment=True),
    "plain": lambda _: Colours(batch_size=32, augment=False),
    "extra": extra,
    "held out": lambda _: HeldOut(Colours(val_size=0.5), batch_size=32),
}


def attach(data: ImageDataModule, device: str, rank: int = 0, world_size: int = 1) -> ImageDataModule:
    """As a Trainer does that trains on this device."""
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, num_devices=1, overfit_batches=0, current_epoch=1, training=True,
        limit_val_batches=1.0, limit_test_batches=1.0, limit_predict_batches=1.0,
        strategy=SimpleNamespace(root_device=torch.device(device)), fit_loop=SimpleNamespace(batch_idx=-1),
    )  # fmt: skip
    return data


def same(ours, theirs, device: str) -> int:
    """How many batches there are; all of them equal, and ours on the device."""
    count = 0
    for one, other in zip(ours, theirs, strict=True):
        # A set that stays on the host is read there, and its batches are copied to the device by the loader.
        assert [part.device.type for part in (*one, *other)] == 6 * [device]
        assert [part.dtype for part in one] == [torch.float32, torch.int64, torch.int64]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        count += 1
    return count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_batches_are_those_of_the_host(name, device, tmp_path, monkeypatch):
    monkeypatch.setattr("robust_pl.data.resident._BLOCK", 100 * 3 * 12 * 12)  # blocks of three batches
    for rank in range(2):
        ours, theirs = (attach(MODULES[name](tmp_path), device, rank, 2) for _ in range(2))
        ours.resident, theirs.resident = True, False
        train = ours.train_dataloader()
        assert isinstance(train.reader.images, ResidentImages)
        assert same(train, theirs.train_dataloader(), device) == len(train) > 0
        assert same(train, theirs.train_dataloader(), device)  # once more
        assert same(ours.val_dataloader(), theirs.val_dataloader(), device) == len(list(theirs.val_dataloader()))
        assert same(ours.test_dataloader(), theirs.test_dataloader(), device)


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_are_divided_as_on_the_host(device):
    """Multiplied by the rounded inverse, 126 of the 256 levels would be other numbers."""
    levels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    host = ImagesInMemory(levels, torch.zeros(256))
    resident = ResidentImages([host], torch.device(device))
    (x, *_), everyone = next(resident.batches(None, 0, [torch.arange(256)])), torch.arange(256)
    assert torch.equal(x.cpu(), host.read(everyone, None)[0])
    assert torch.equal(resident.read(everyone, None)[0].cpu(), x.cpu())
    assert (levels.float() * (1 / torch.tensor(255.0)) != x.cpu()).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_is_the_same_and_resumes(tmp_path, device, mixed, monkeypatch):
    """Also where a list of augmentations works on the batches; those before CutMix on blocks of three."""
    monkeypatch.setattr("robust_pl.data.resident._BLOCK", 800 * 64)

    def fit(resident: bool | None, **kwargs):
        augment = [CropAndFlip(2, "reflect"), Cutout(4, 0.5), *([CutMix(), Cutout(2)] if mixed else [])]
        data = DigitsDataModule(batch_size=256, augment=augment)
        data.resident = resident
        return fit_module(tmp_path, data, max_epochs=2, accelerator=device, **kwargs)

    def seen(run):
        return [step[:3] for step in run.seen]

    saver = SaveAt(tmp_path)
    full, host = fit(True, callbacks=[saver]), fit(False)
    assert len(full.seen) == 10 and len({step[3] for step in full.seen}) == 10 and seen(full) == seen(host)
    pixels = torch.tensor([[step[3] for step in run.seen] for run in (full, host)], dtype=torch.float64)
    assert torch.allclose(pixels[0], pixels[1], rtol=1e-12)
    assert full.validated == host.validated and full.validated_pixels == pytest.approx(host.validated_pixels, rel=1e-12)
    for name in ("batch1", "batch3", "validation5", "epoch5", "batch7"):
        path, batches = saver.saved[name]
        assert fit(True, ckpt=path).seen == full.seen[batches:], name


@pytest.mark.parametrize("device", DEVICES)
def test_a_list_is_done_ahead_where_something_is_trained(device, monkeypatch):
    """An attack that fits itself to the loader in a test sees plain images, as it does on the host."""
    monkeypatch.setattr("robust_pl.data.resident._BLOCK", 70 * 3 * 12 * 12)
    lists = [CropAndFlip(2), Cutout(3)], [CropAndFlip(2), CutMix(), Cutout(3)]
    for augment, training in product(lists, (True, False)):
        data = attach(Colours(batch_size=32, augment=augment), device)
        data.resident, data.trainer.training = True, training
        for batch in data.train_dataloader():
            plain = (*data.train_set.read(batch[2].cpu(), None), batch[2].cpu())
            done = 1 if len(augment) == 3 else 2
            x, y, _ = augmented(plain, augment[:done], 10, data.seed, 1) if training else plain
            assert torch.equal(batch[0].cpu(), x) and torch.equal(batch[1].cpu(), y)
            x, y, _ = data.on_after_batch_transfer(batch, 0)
            everything = augmented(plain, augment, 10, data.seed, 1) if training else plain
            assert torch.equal(x.cpu(), everything[0]) and torch.allclose(y.cpu(), everything[1])


def test_what_is_chosen(monkeypatch):
    """A copy is made once, of what fits, and only where that is asked for on the CPU."""
    host, cpu, cuda = Colours().train_set, torch.device("cpu"), torch.device("cuda")
    residence = Residence()
    assert residence.place(host, cpu, None) is host and residence.place(host, cpu, False) is host
    copy = residence.place(host, cpu, True)
    assert isinstance(copy, ResidentImages) and residence.place(host, cpu, True) is copy
    assert residence.place(host, cuda, False) is host
    residence.clear()
    assert residence.place(host, cpu, True) is not copy
    made: list[int] = []
    monkeypatch.setattr("robust_pl.data.resident.ResidentImages", lambda parts, device: made.append(len(parts)))
    size = 300 * (3 * 12 * 12 + 8)
    for free, expected in ((4 * size - 1, []), (4 * size, [1])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        Residence().place(host, cuda, None)
        assert made == expected


def test_what_stays_on_the_host():
    class Own(ImagesInMemory):
        def read(self, index, keys):
            return super().read(index, keys)

    host = Colours().train_set
    files, own = Plain(9), Own(host.images, host.labels)
    for images in (files, own):
        assert images.parts() is None and Residence().place(images, torch.device("cpu"), True) is images
    pixels = torch.zeros(4, 3, 12, 12, dtype=torch.uint8)
    of_other_white, of_other_shape = (
        ImagesInMemory(pixels, torch.zeros(4), crop_and_flip, 16),
        ImagesInMemory(pixels[:, :, :8], torch.zeros(4), crop_and_flip),
    )
    for other in (of_other_white, of_other_shape, ImagesInMemory(pixels, torch.zeros(4))):

        class Two(Images):
            def __len__(self) -> int:
                return len(host) + 4

            def parts(self, other=other):
                return [host, other]

        two = Two()
        assert Residence().place(two, torch.device("cpu"), True) is two


def test_memory_is_given_back_after_the_run(tmp_path):
    data = DigitsDataModule(batch_size=256)
    data.resident = True
    fit_module(tmp_path, data, max_epochs=1)
    assert data._residence._copies == [] and isinstance(data._train_loader.reader.images, ResidentImages)


@CUDA
def test_nothing_waits_for_the_host():
    """Neither the copy of a batch's positions nor anything behind it; the first batch makes what is kept."""
    data = attach(Colours(batch_size=32, augment=[AsUsual(), CropAndFlip(), Cutout(4)]), "cuda")
    assert data.resident is None
    loader = data.train_dataloader()
    assert isinstance(loader.reader.images, ResidentImages)
    list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        count = sum(1 for _ in loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == len(loader)
