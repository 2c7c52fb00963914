"""Several processes: chunks that are handed out, the same figures and losses on 1, 2 and 4, and synchronised BatchNorm."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, distributed_c10d

from robust_pl.callbacks import ProgressBar
from robust_pl.callbacks.attacks.prepare import prepared
from robust_pl.data import DigitsDataModule
from robust_pl.data.dealer import Dealer
from robust_pl.data.images import Images
from robust_pl.data.loaders import EvalLoader
from robust_pl.methods.ranks import others_wait
from robust_pl.nets import DualNet, SmallCNN
from robust_pl.nets.folding import Folded, look_at
from robust_pl.nets.frozen import Frozen
from robust_pl.nets.synced import refuse_to_sync

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """What the processes of one evaluation share."""
    store = HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    return store


def dealers(count: int, name: str = "a") -> list[Dealer]:
    found = [Dealer() for _ in range(count)]
    for dealer in found:
        dealer.begin(name)
    return found


# Chunks that are handed out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [0, 1, 3, 17])
def test_every_chunk_goes_to_one_process_whatever_their_speed(store: HashStore, world: int, chunks: int) -> None:
    order = random.Random(world * 100 + chunks)
    for turn in range(3):
        hands = [dealer.deal(chunks, rank, world) for rank, dealer in enumerate(dealers(world, f"{turn}"))]
        taken: list[list[int]] = [[] for _ in hands]
        working = set(range(world))
        while working:
            rank = order.choice(sorted(working))
            place = next(hands[rank], None)
            if place is None:
                working.remove(rank)
            else:
                taken[rank].append(place)
        assert sorted(place for own in taken for place in own) == list(range(chunks))
        for rank, own in enumerate(taken):
            assert own == sorted(own) and own[:1] == [rank][: rank < chunks]  # the first one is always the same


def test_a_process_that_is_slow_gets_fewer(store: HashStore) -> None:
    fast, slow = (dealer.deal(10, rank, 2) for rank, dealer in enumerate(dealers(2)))
    assert next(slow) == 1
    assert list(fast) == [0, 2, 3, 4, 5, 6, 7, 8, 9] and list(slow) == []


def test_where_none_is_left_all_are_taken_and_the_bar_says_so(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = dealers(2)
    hands = mine.deal(3, 0, 2)
    assert next(hands) == 0 and list(other.deal(3, 1, 2)) == [1, 2]
    data, shown, bar = DigitsDataModule(), [], ProgressBar()
    data.deal(mine)
    assert data.dealt == 1 and list(hands) == [] and data.dealt == 3  # what is left was the other's
    monkeypatch.setattr(bar, "_update", lambda bar_id, count: shown.append((bar_id, count)))
    bar.test_progress_bar_id = 7
    bar.on_test_epoch_end(SimpleNamespace(datamodule=data, sanity_checking=False), None)
    assert shown == [(7, 3)]


def test_shares_are_fixed_where_nobody_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: pytest.fail("the store was asked"))
    dealer = Dealer()
    assert [list(dealer.deal(7, rank, 3)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_round_is_dealt_once(store: HashStore) -> None:
    (dealer,) = dealers(1)
    assert list(dealer.deal(3, 0, 1)) == [0, 1, 2] and dealer.place == 2
    assert list(dealer.deal(3, 1, 2)) == [1]  # nobody began again


class Plain(Images):
    """Samples that say where they stand."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        return index.view(-1, 1, 1, 1).float(), index % 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_whole_chunks_and_one_ahead_at_most(store: HashStore, workers: int) -> None:
    """Two workers read a chunk of eight together."""
    one, two = dealers(2)
    loaders = [EvalLoader(Plain(50), torch.arange(50), 8, r, 2, workers, dealer=d) for r, d in enumerate((one, two))]
    assert [len(loader) for loader in loaders] == [7, 7]
    fast, slow = iter(loaders[0]), iter(loaders[1])
    x, y, index = next(slow)
    assert index.tolist() == list(range(8, 16)) == x.flatten().int().tolist() and y.tolist() == (index % 10).tolist()
    rest = [chunk.tolist() for *_, chunk in fast]
    ahead = [chunk.tolist() for *_, chunk in slow]
    assert len(ahead) == (1 if workers else 0)  # it had been asked for while the first one was at work
    every = [list(range(i, min(i + 8, 50))) for i in range(0, 50, 8)]
    assert sorted([*rest, *ahead, index.tolist()]) == every and rest[0] == every[0]


def test_the_data_hand_chunks_out_where_all_of_them_are_asked_for(store: HashStore) -> None:
    data = DigitsDataModule(eval_batch_size=50, num_workers=0)
    trainer = SimpleNamespace(global_rank=1, world_size=2, limit_test_batches=1.0, limit_val_batches=1.0, num_devices=2)
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = trainer
    assert data.test_dataloader().dealer is None
    dealer = Dealer()
    data.deal(dealer)
    assert data.test_dataloader().dealer is dealer and len(data.test_dataloader()) == 8 and len(data.val_dataloader()) == 3
    for limit in (1, 0.5):  # which chunks these are would depend on who took which
        trainer.limit_test_batches = limit
        assert data.test_dataloader().dealer is None and len(data.test_dataloader()) == 4
    trainer.world_size, trainer.limit_test_batches = 1, 1.0
    assert data.test_dataloader().dealer is None


def test_the_others_wait_for_the_first(monkeypatch: pytest.MonkeyPatch, store: HashStore) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    said: list[str] = []
    monkeypatch.setattr(HashStore, "set", lambda self, key, value: said.append(key), raising=False)
    monkeypatch.setattr(HashStore, "wait", lambda self, keys, patience: said.extend(keys), raising=False)
    for first in (True, False):
        with others_wait(SimpleNamespace(is_global_zero=first)):
            pass
    with pytest.raises(KeyError), others_wait(SimpleNamespace(is_global_zero=True)):
        raise KeyError  # the others must not wait for it for ever
    assert len(said) == 3 and all(key.startswith("robust_pl/done/") for key in said)


# SyncBatchNorm ----------------------------------------------------------------------------------------------------


class Activating(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_synchronised_batchnorm_has_the_same_weights_and_leaves_frozen_networks_in_eval_mode() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"student": SmallCNN(width=4), "teacher": Frozen(SmallCNN(width=4)), "dual": DualNet(SmallCNN(width=4))}
    )
    x = torch.rand(4, 1, 8, 8)
    net.train()
    net["student"](x)  # so that statistics are not those of the beginning
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    logits = {name: part.eval()(x).detach() for name, part in net.items()}
    trained = {name: p.requires_grad for name, p in net.named_parameters()}
    net.train()
    refuse_to_sync(net)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in synced.state_dict().items())
    assert {name: p.requires_grad for name, p in synced.named_parameters()} == trained
    modes = [m.training for m in synced["teacher"].modules()]
    assert not any(modes) and all(m.training for m in synced["student"].modules())
    with prepared(synced, "eval"):  # an attack in eval mode has nothing to synchronise, and so runs here, too
        for name in ("student", "teacher", "dual"):
            torch.testing.assert_close(synced[name](x), logits[name])


def test_synchronised_batchnorm_is_folded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    x = torch.rand(4, 1, 8, 8)
    net(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    assert len(look_at(synced, x).pairs) == 1
    torch.testing.assert_close(Folded(synced)(x), synced(x))


def test_what_synchronising_would_lose_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Activating(4))
    with pytest.raises(
        ValueError, match=r"1 is a Activating, of which trainer\.sync_batchnorm would keep the normalisation alone"
    ):
        refuse_to_sync(net)
    refuse_to_sync(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))))


# 1, 2 and 4 processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What :mod:`tests.scale_processes` wrote on each number of processes, and the tables of its evaluations."""
    folder = tmp_path_factory.mktemp("scale")
    found: dict[str, Any] = {"folder": folder}
    for world in (1, 2, 4):
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(29600 + world)]
        command = [sys.executable, *command, "-m", "tests.scale_processes", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ})
        assert (folder / f"found{world}.json").is_file(), done.stderr[-3000:]
        found[str(world)] = json.loads((folder / f"found{world}.json").read_text())
    return found


@pytest.mark.slow
def test_evaluation_is_the_same_on_1_2_and_4_processes(found: dict[str, Any]) -> None:
    tables = [(found["folder"] / f"test{world}" / "predictions.csv").read_bytes() for world in (1, 2, 4)]
    assert tables[0] == tables[1] == tables[2] and tables[0].count(b"\n") == 361
    figures = [found[world]["evaluation"] for world in ("1", "2", "4")]
    losses = [figure.pop("test/loss") for figure in figures]
    assert figures[0] == figures[1] == figures[2] and 0 < figures[0]["test/acc_worst"] < figures[0]["test/acc_clean"]
    assert max(losses) - min(losses) < 1e-5  # float32, summed in another order


@pytest.mark.slow
def test_training_is_the_same_on_1_2_and_4_processes_and_with_accumulated_gradients(found: dict[str, Any]) -> None:
    whole = found["1"]["ddp"]
    assert len(whole["losses"]) == 6 and whole["losses"][-1] < whole["losses"][0]
    for world in ("1", "2", "4"):
        for kind in ("ddp", "accumulated"):
            assert found[world][kind]["losses"] == pytest.approx(whole["losses"], abs=1e-6), (world, kind)
            assert found[world][kind]["val"] == whole["val"]


@pytest.mark.slow
def test_sharded_training_is_that_of_ddp(found: dict[str, Any]) -> None:
    for precision, kinds in (("32-true", ("step", "pass")), ("bf16-mixed", ("step",))):  # these with accumulated gradients
        found_there = found["2"][precision]
        for kind in kinds:
            assert found_there[kind]["losses"] == pytest.approx(found_there["ddp"]["losses"], abs=1e-4), (precision, kind)
            assert found_there[kind]["val"] == found_there["ddp"]["val"]
        assert found_there["ddp"]["held"] == 1
    assert all(found["2"]["32-true"][kind]["held"] < 0.6 for kind in ("step", "pass"))  # half of all that can be halved
    saved = [torch.load(found["folder"] / f"{kind}2.ckpt", weights_only=True) for kind in ("ddp", "step", "pass")]
    for other in saved[1:]:
        assert other["state_dict"].keys() == saved[0]["state_dict"].keys()
