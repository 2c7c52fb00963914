"""What a store does with a user's own loaders: whose samples come in any order, twice, or from another data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD, RobustEvaluation
from robust_pl.data.loaders import EvalLoader

from .test_store import BATCH, SAMPLES, attacks, contents, data, net


def indexed(order: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    x, y = data()
    return [(x[rows], y[rows], rows) for rows in order.split(BATCH)]


def test_shuffled_and_unequal_batches_end_with_the_table_in_any_order(tmp_path: Path) -> None:
    evaluate(net(), data(), attacks(), batch_size=BATCH, store=tmp_path / "whole")
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    evaluate(net(), indexed(order), attacks(), store=tmp_path / "shuffled")
    header, *rows = (tmp_path / "shuffled/predictions.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows} == set(map(str, range(SAMPLES)))
    right = {row.split(",")[0]: row.split(",")[5] for row in rows}
    there = {row.split(",")[0]: row.split(",")[5] for row in (tmp_path / "whole/predictions.csv").read_text().splitlines()}
    assert header and right.items() <= there.items()


@pytest.mark.parametrize("order", [[0] * 32, [*range(16), 0, *range(20, 30)], [*range(16), *range(5, 21)]])
def test_a_sample_that_comes_twice_is_refused(tmp_path: Path, order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"position .*: give batches of \(x, y, index\)"):
        evaluate(net(), indexed(torch.tensor(order)), {"fgsm": FGSM(0.02)}, store=tmp_path / "run")
    assert not (tmp_path / "run/predictions.csv").exists()


@pytest.mark.parametrize("index", [torch.rand(60), torch.arange(59), ["a"] * 60])
def test_what_is_no_index_is_refused(index: object) -> None:
    with pytest.raises(ValueError, match="give the position of each sample"):
        evaluate(net(), [(*data(), index)], {"fgsm": FGSM(0.02)})


class Plain(LightningModule):
    """A user's own module with a user's own loader."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: object, number: int) -> None:
        pass


def trained_by(folder: Path, samples: tuple[Tensor, Tensor], batch_size: int = BATCH, precision: str = "32") -> None:
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[PGD(0.02, steps=2), RobustEvaluation(output_dir=str(folder))],
    )
    trainer.test(Plain(), DataLoader(TensorDataset(*samples), batch_size), verbose=False)


def test_a_users_own_loader_of_other_images_is_refused(tmp_path: Path) -> None:
    trained_by(tmp_path / "run", data())
    before = contents(tmp_path / "run")
    for changed in ({"samples": data(1)}, {"batch_size": 20}, {"precision": "bf16-mixed"}):
        with pytest.raises(ValueError, match=r"other images or labels|precision: '32-true' there"):
            trained_by(tmp_path / "run", **{"samples": data(), **changed})
        assert contents(tmp_path / "run") == before
    trained_by(tmp_path / "run", data())
    assert contents(tmp_path / "run") == before


# Which batches are left -------------------------------------------------------------------------------------------


class Positions:
    def read(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(index), 1, 1, 1), index


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [1.0, 0.5, 1, 2, 100])
def test_what_is_left_together_with_what_is_finished_is_what_was_asked_for(world_size: int, limit: int | float) -> None:
    def firsts(finished: frozenset[int]) -> list[int]:
        loaders = [EvalLoader(Positions(), torch.arange(50), 10, r, world_size, 0, finished, limit) for r in range(world_size)]
        found = [int(index[0]) for loader in loaders for _, _, index in loader]
        assert len(found) == len(set(found))
        return sorted(found)

    asked = firsts(frozenset())
    shares = [list(range(0, 50, 10))[r::world_size] for r in range(world_size)]
    counts = [min(limit, len(s)) if isinstance(limit, int) else int(len(s) * limit) for s in shares]
    assert asked == sorted(first for share, count in zip(shares, counts, strict=True) for first in share[:count])
    for finished in ({0}, {10, 20}, set(asked)):
        done = frozenset(finished & set(asked))
        assert sorted([*firsts(done), *done]) == asked
