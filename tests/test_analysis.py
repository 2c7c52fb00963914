"""What all analyses share: order, sums, files, resuming, and that nothing of the network is changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import Analysis, RobustEvaluation
from robust_pl.report import HeatMap, Lines, Record, Sheet, plot_record


class Brightness(Analysis):
    """Accuracy at two brightnesses, and the mean pixel."""

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        assert not model.training
        right = [self.ask(model, factor * x).argmax(1) == y for factor in (1.0, 0.5)]
        self.keep(right=torch.stack(right, 1))
        self.add(pixels=x.mean((1, 2, 3)).sum())

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        accuracy = kept["right"].double().mean(0).tolist()
        mean = (sums["pixels"] / len(kept["index"])).item()
        curve = Lines("accuracy", "brightness", "accuracy", [1.0, 0.5], {"net": accuracy}, share=True)
        picture = HeatMap("right", "brightness", "sample", [1.0, 0.5], kept["index"].tolist(), kept["right"].double().tolist())
        table = Sheet("accuracy", ["brightness", "accuracy"], [[1.0, accuracy[0]], [0.5, accuracy[1]]], share=True)
        figures = {"dark": accuracy[1], "pixel": mean}
        return Record("Brightness", self.name, "Brightness", figures, [table], [curve], [picture])


class Net(LightningModule):
    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean((1, 2, 3))
        return torch.stack([torch.full_like(mean, 0.4), mean], 1)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


def data(n: int = 7) -> TensorDataset:
    x = torch.linspace(0.1, 1, n).view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return TensorDataset(x, (x[:, 0, 0, 0] > 0.4).long())


def test_callable_gives_figures_and_leaves_the_network_alone() -> None:
    net = Net().train()
    record = Brightness()(net, DataLoader(data(), batch_size=3))
    x = data().tensors[0][:, 0, 0, 0].double()
    # At half of the brightness those of 0.4 to 0.8 seem dark.
    assert record.figures["dark"] == pytest.approx(((x / 2 > 0.4) == (x > 0.4)).double().mean().item())
    assert record.figures["pixel"] == pytest.approx(x.mean().item())
    assert record.about["samples"] == 7 and record.about["forwards_per_sample"] == 2
    assert net.training and net.norm.running_mean.item() == 0


def test_samples_limits_what_is_seen_and_order_is_that_of_the_index() -> None:
    x, y = data().tensors
    batches = [(x[i], y[i], torch.tensor(i)) for i in ([5, 4, 6], [1, 0], [3, 2])]
    record = Brightness(samples=4)(Net(), batches)
    assert record.maps[0].y == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="Brightness saw no sample"):
        Brightness()(Net(), [])
    with pytest.raises(ValueError, match="samples=0"):
        Brightness(samples=0)


def test_callback_writes_record_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = Brightness(name="light")
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[analysis],
    )
    (figures,) = trainer.test(Net(), DataLoader(data(), batch_size=2), verbose=False)
    folder = tmp_path / "analysis" / "test"
    read = Record.read(folder / "light.json")
    assert figures["test/light_dark"] == pytest.approx(read.figures["dark"])
    assert read == analysis.record
    assert "Brightness: " in (said := capsys.readouterr().out) and "light.json" in said
    assert (folder / "light.png").stat().st_size > 1000
    (folder / "light.json").write_text(json.dumps({"kind": 1, "other": 2}))
    with pytest.raises(ValueError, match=r"light\.json holds no record"):
        Record.read(folder / "light.json")


class Read(Brightness):
    """The type of what it saw."""

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        assert x.dtype == torch.float64
        super().look(model, x, y, index)


class Interrupted(RobustEvaluation):
    finished = frozenset([0, 4])  # type: ignore[assignment]


class Stored:
    """A test set of which one batch is not finished."""

    eval_batch_size = 2
    leave_out = None

    @property
    def test_set(self) -> Stored:
        return self

    def __len__(self) -> int:
        return 7

    def read(self, index: Tensor, keys: None) -> tuple[Tensor, Tensor]:
        x, y = data().tensors
        return x[index], y[index]


def test_batches_of_an_interrupted_test_are_seen_in_its_precision() -> None:
    analysis = Read()
    trainer = SimpleNamespace(
        datamodule=Stored(), callbacks=[Interrupted()], global_rank=0, world_size=1, precision_plugin=DoublePrecision()
    )
    analysis._catch_up(trainer, Net().double())  # type: ignore[arg-type]
    assert torch.cat(analysis._now.kept["index"]).tolist() == [0, 1, 4, 5]


def test_record_without_curves_has_no_picture() -> None:
    assert plot_record(Record("A", "a", "A", {"x": 1.0})) is None
