"""Workers: how many, that they stay, and that nothing is lost between epochs."""

from __future__ import annotations

import gc
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from robust_pl.data import DigitsDataModule, HeldOut
from robust_pl.data.base import ImageDataModule
from robust_pl.data.images import Images
from robust_pl.data.loaders import EvalLoader, TrainLoader, TrainOrder
from robust_pl.data.reading import MOST_WORKERS, BatchReader, chosen_workers

from .test_data import Own, Plain
from .test_data_resume import Recorder
from .test_resident import CUDA, DEVICES, attach


class Process(Images):
    """Labels tell which process read a sample."""

    def __len__(self) -> int:
        return 40

    def sample(self, position, key):
        return torch.full((1, 1, 1), position / 1000), os.getpid()


def test_workers_stay_from_epoch_to_epoch():
    loader = TrainLoader(Process(), TrainOrder(torch.arange(40), 4, 0), num_workers=2)
    alone = TrainLoader(Process(), TrainOrder(torch.arange(40), 4, 0), num_workers=0)
    processes = []
    for epoch, steps in enumerate((10, 3, 10)):  # the second is broken off, as limit_train_batches does
        loader.sampler.set_epoch(epoch)
        alone.sampler.set_epoch(epoch)
        read, expected = iter(loader), iter(alone)
        batches = [next(read) for _ in range(steps)]
        for (x, _, index), (x_alone, _, index_alone) in zip(batches, expected, strict=False):
            assert torch.equal(x, x_alone) and torch.equal(index, index_alone)
        processes.append({int(one) for _, y, _ in batches for one in y})
    assert len(processes[0]) == 2 and processes[0] == processes[1] == processes[2] and os.getpid() not in processes[0]


def test_workers_of_an_evaluation_stay_and_resuming_starts_where_it_stopped():
    loader = EvalLoader(Process(), torch.arange(40), 10, num_workers=1)
    assert len({int(one) for _ in range(2) for _, y, _ in loader for one in y}) == 1
    one, other = (TrainLoader(Process(), TrainOrder(torch.arange(40), 4, 0), num_workers=1) for _ in range(2))
    read = iter(one)
    seen = [next(read)[2].tolist() for _ in range(4)]
    other.load_state_dict(one.state_dict())
    assert seen + [index.tolist() for *_, index in other] == [index.tolist() for index in one.sampler.batches(0)]


def test_two_readers_of_one_loader():
    loader = EvalLoader(Plain(40), torch.arange(40), 10, num_workers=1)
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 4
    with pytest.raises(RuntimeError, match="make two, or set num_workers to 0"):
        next(first)
    loader = EvalLoader(Plain(40), torch.arange(40), 10, num_workers=0)
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 4 and len(list(first)) == 3


def test_chosen_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [chosen_workers(Plain(9), processes) for processes in (None, 1, 2, 3, 16)] == [MOST_WORKERS, 8, 6, 4, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert chosen_workers(Plain(9)) == 3
    assert chosen_workers(DigitsDataModule().train_set) == 0


def test_workers_of_a_data_module(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)

    def workers(data: ImageDataModule) -> tuple[int, int]:
        data.trainer = SimpleNamespace(
            global_rank=0, world_size=2, num_devices=2, overfit_batches=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )  # fmt: skip
        return data.train_dataloader().reader.num_workers, data.test_dataloader().reader.num_workers

    assert workers(Own(batch_size=4)) == (2, 2) and workers(Own(batch_size=4, num_workers=3)) == (3, 3)
    assert workers(DigitsDataModule()) == (0, 0)
    assert workers(HeldOut(Own(val_size=0.5), batch_size=4)) == (2, 2)


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_workers_end_with_their_loader(in_a_cycle):
    """Told to: for those that the garbage collector finds in a cycle torch waits five seconds each."""
    loader = EvalLoader(Process(), torch.arange(40), 4, num_workers=2)
    assert len(list(loader)) == 10
    workers, stop = loader.reader._loader._iterator._workers, loader.reader._stop
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers) and stop.alive
    if in_a_cycle:
        loader.myself = loader
    del loader
    gc.collect()
    assert not stop.alive and [worker.exitcode for worker in workers] == [0, 0]


class Sums(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0].flatten(1)).sum()


def test_workers_end_with_the_run(tmp_path):
    data = Own(batch_size=4, num_workers=1, val_size=4)
    data.load_train = Process
    Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=3,
    ).fit(Sums(), data)  # fmt: skip
    assert not multiprocessing.active_children()
    labels = torch.cat([y for _, y, _ in data._train_loader])
    assert len(labels) == 36 and os.getpid() not in labels  # others, for whoever reads on


class Failing(Sums):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("nothing to do with data")


def test_workers_end_with_a_run_that_fails(tmp_path):
    data = Own(batch_size=4, num_workers=1, val_size=4)
    data.load_train = Process
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(ZeroDivisionError, match="nothing to do with data"):
        trainer.fit(Failing(), data)
    assert data._train_loader.reader.num_workers == 1
    assert {child.pid for child in multiprocessing.active_children()} <= before


class Grey(Images):
    """8-bit samples, as of files."""

    white = 100

    def __len__(self) -> int:
        return 40

    def sample(self, position, key):
        return torch.full((1, 2, 2), position + (0 if key is None else int(key % 7)), dtype=torch.uint8), position % 3


class Mine(Grey):
    def read(self, index, keys):
        x, y = super().read(index, keys)
        return x / 2, y


SETS = {
    "digits": lambda: DigitsDataModule().train_set,
    "files": Grey,
    "floats": lambda: Plain(40),
    "in a way of its own": Mine,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", SETS)
def test_pixels_divided_on_the_device_are_those_of_the_host(name, workers, device):
    batches = [torch.arange(20), torch.arange(20, 33)]
    host, ours = (BatchReader(SETS[name](), 5, workers) for _ in range(2))
    ours.device = torch.device(device)
    for one, other in zip(ours.read(3, batches), host.read(3, batches), strict=True):
        assert [part.device.type for part in one] == 3 * [device] and one[0].dtype == torch.float32
        assert all(torch.equal(a.cpu(), b) for a, b in zip(one, other, strict=True))
    travels = ours._loader.dataset[3, batches[0]][0].dtype
    assert travels == (torch.uint8 if name in ("digits", "files") else torch.float32)


@CUDA
def test_a_run_on_a_device_reads_files_there():
    data = attach(Own(batch_size=4, num_workers=1), "cuda")
    (x, y, index), on_host = next(iter(data.train_dataloader())), Own(batch_size=4, num_workers=0)
    assert {part.device.type for part in (x, y, index)} == {"cuda"} and data.resident is None
    assert torch.equal(x.cpu(), on_host.train_set.read(index.cpu(), None)[0])
