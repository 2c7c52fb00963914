"""``val_max/...``: the higher figure of raw and averaged weights, and the checkpoint that it chooses."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from robust_pl.callbacks import EMA, FGSM, PGD, SWA, RobustEvaluation
from robust_pl.cli_monitor import choose_monitor
from robust_pl.data import DigitsDataModule
from robust_pl.methods import StandardTraining
from robust_pl.metrics.scoreboard import Row, best_of
from robust_pl.nets import SmallCNN

from .conftest import TINY
from .test_averaging import QUIET, sgd
from .test_ddp import DDP
from .test_ddp import run as robust_pl_process

CLI = Callable[..., None]
EMA_TOO = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9", "--trainer.callbacks.ramp=false")
CSV = ("--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.init_args.save_dir=log")


class Figures(Callback):
    """What each validation logged."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def validated(*callbacks: Callback, epochs: int = 4) -> list[dict[str, float]]:
    seed_everything(0, verbose=False)
    figures = Figures()
    method = StandardTraining(SmallCNN(width=4), optimizer=sgd)
    trainer = Trainer(max_epochs=epochs, callbacks=[FGSM(0.1), PGD(0.1, steps=2), *callbacks, figures], **QUIET)
    trainer.fit(method, DigitsDataModule(batch_size=64, val_size=100))
    return figures.epochs


def test_the_higher_figure_by_hand() -> None:
    raw = [Row("clean", (3, 4), (4, 4)), Row("pgd", (1, 2), (4, 4), 5.0, 4.0, 0.1)]
    averaged = [Row("clean", (4, 2), (4, 4)), Row("pgd", (2, 2), (4, 4), 5.0, 4.0, 0.2)]
    assert best_of(raw, averaged) == {
        **{"acc_clean": 0.875, "worst_class_clean": 0.75, "worst_tenth_clean": 0.75, "fair_clean": 1.625},
        **{"acc_pgd": 0.5, "worst_class_pgd": 0.5, "worst_tenth_pgd": 0.5, "fair_pgd": 1.0},
    }
    assert best_of(raw)["acc_clean"] == 0.875


def test_it_is_logged_of_all_averages_from_the_first_validation_on() -> None:
    epochs = validated(EMA(0.9, ramp=False), EMA(0.9, name="late", warmup=35), SWA(start=2))
    assert [("val_late/acc_pgd" in figures, "val_swa/acc_pgd" in figures) for figures in epochs] == [
        (False, False),
        (True, False),
        (True, True),
        (True, True),
    ]
    for figures in epochs:
        for key in ("acc_clean", "acc_fgsm", "acc_pgd", "acc_worst", "worst_class_pgd", "worst_tenth_pgd", "fair_pgd"):
            here = [
                figures[f"{place}/{key}"] for place in ("val", "val_ema", "val_late", "val_swa") if f"{place}/{key}" in figures
            ]
            assert figures[f"val_max/{key}"] == max(here), key
        assert not {"val_max/loss", "val_max/nsd_pgd", "val_max/seconds_pgd", "val_max/forwards_pgd"} & figures.keys()
    above = [figures["val_max/acc_pgd"] > figures["val/acc_pgd"] for figures in epochs]
    below = [figures["val_max/acc_pgd"] > figures["val_ema/acc_pgd"] for figures in epochs]
    assert any(above) and any(below), "raw or averaged weights are better throughout, which tests less"


def test_before_an_average_begins_it_is_the_raw_figure() -> None:
    (figures,) = validated(EMA(warmup=1000), epochs=1)
    assert figures["val_max/acc_pgd"] == figures["val/acc_pgd"] and "val_ema/acc_pgd" not in figures


@pytest.mark.parametrize("callbacks", [(), (EMA(), RobustEvaluation(averages=False))])
def test_without_an_average_it_is_not_logged(callbacks: tuple[Callback, ...]) -> None:
    (figures,) = validated(*callbacks, epochs=1)
    assert "val/acc_pgd" in figures and not any(key.startswith("val_max") for key in figures)


def test_an_average_may_not_take_its_name() -> None:
    with pytest.raises(ValueError, match=r"name='max' of an average: .* neither 'raw' nor 'max'"):
        EMA(name="max")


@pytest.mark.parametrize(
    ("monitor", "callbacks", "more", "message"),
    [
        (
            "val_max/acc_pgd10",
            [],
            False,
            "there is no average: add one to trainer.callbacks, such as EMA, or take val/acc_pgd10",
        ),
        ("val_max/acc_pgd", [EMA()], False, "will never be logged: choose one of .*val_max/acc_pgd10"),
        ("val_max/loss", [EMA()], False, "better the higher, val_max/acc_"),
        ("val_max/nsd_pgd10", [EMA()], False, "take val_max/fair_pgd10"),
        ("val_ema/acc_pgd10", [SWA()], False, "needs the average 'ema'"),
        ("val_max/acc_pgd10", [EMA()], False, None),
        ("val_max/worst_class_pgd10", [SWA()], False, None),
        ("val_max/acc_pgd10", [], True, None),
        ("val/acc_pgd", [], False, r"choose one of val/acc_clean, val/acc_pgd10, val/acc_worst$"),
    ],
)
def test_monitors(monitor: str, callbacks: list[Callback], more: bool, message: str | None) -> None:
    if message is None:
        assert choose_monitor(monitor, ["pgd10"], callbacks, more) == monitor
        return
    with pytest.raises(ValueError, match=message):
        choose_monitor(monitor, ["pgd10"], callbacks, more)


def test_averages_that_are_not_evaluated_choose_nothing() -> None:
    for monitor in ("val_max/acc_pgd", "val_ema/acc_pgd"):
        with pytest.raises(ValueError, match=r"set evaluation\.averages to true"):
            choose_monitor(monitor, ["pgd"], [EMA()], False, averages_too=False)


# Command line ---------------------------------------------------------------------------------------------------------


def test_best_is_the_best_of_raw_and_averaged_over_all_epochs(robust_pl: CLI, tiny: Path) -> None:
    fit = ("fit", "-c", tiny, *EMA_TOO, *CSV, "--run.monitor", "val_max/acc_pgd", "--trainer.max_epochs", 4)
    robust_pl(*fit, "--data.init_args.val_split", "last", "--data.init_args.val_size", 300)
    with next(Path("log").rglob("metrics.csv")).open() as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["val_max/acc_pgd"]]
    raw, averaged, highest = ([float(row[f"{place}/acc_pgd"]) for row in rows] for place in ("val", "val_ema", "val_max"))
    assert highest == [max(pair) for pair in zip(raw, averaged, strict=True)] and len(rows) == 4
    best = torch.load("runs/tiny/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == highest.index(max(highest))
    assert best["robust_pl_averages"]["ema"]["weights"]
    (state,) = [state for state in best["callbacks"].values() if state.get("monitor") == "val_max/acc_pgd"]
    assert float(state["best_model_score"]) == pytest.approx(max(highest))


def test_it_is_refused_on_the_command_line_where_there_is_no_average(
    robust_pl: CLI, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (("--run.monitor", "val_max/acc_pgd"), "there is no average"),
        ((*EMA_TOO, "--run.monitor", "val_max/acc_pgd", "--evaluation.averages", "false"), "set evaluation.averages to true"),
        (("--trainer.callbacks+=EMA", "--trainer.callbacks.name=max"), "neither 'raw' nor 'max'"),
    ):
        with pytest.raises(SystemExit):
            robust_pl("fit", "-c", tiny, *more)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_choose_as_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    common = ("fit", "-c", "tiny.yaml", *EMA_TOO, "--run.monitor", "val_max/acc_pgd", *DDP, "2")
    robust_pl_process(tmp_path, *common, "--data.init_args.batch_size", "64", *CSV)
    with next((tmp_path / "log").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_max/acc_pgd"]]
    assert len(rows) == 2
    for row in rows:
        assert float(row["val_max/acc_pgd"]) == max(float(row["val/acc_pgd"]), float(row["val_ema/acc_pgd"]))
    assert (tmp_path / "runs/tiny/checkpoints/best.ckpt").is_file()
