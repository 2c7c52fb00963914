"""Every method with each perturbation and average: one attack a step, weights restored, resumed equal to uninterrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from robust_pl.callbacks import AWP, EMA, SAM
from robust_pl.data import DigitsDataModule
from robust_pl.methods import Method

from .method_table import METHODS, Case, sgd, still
from .stopper import StopAfterEpoch

COMBINATIONS: dict[str, Callable[[], list[Callback]]] = {
    "nothing": lambda: [],
    "AWP": lambda: [AWP(0.01)],
    "SAM": lambda: [SAM(0.05)],
    "EMA": lambda: [EMA(0.9)],
    "AWP+EMA": lambda: [AWP(0.01), EMA(0.9)],
}
STEPS = 2


def every_combination() -> Iterator[Any]:
    """The default suite has the richest combination that a method takes."""
    for name, case in METHODS.items():
        richest = "EMA" if "AWP" in (case.refuses or {}) else "AWP+EMA"
        for combination in COMBINATIONS:
            yield pytest.param(name, combination, marks=[] if combination == richest else pytest.mark.slow)


class Losses(Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.seen.append(trainer.callback_metrics["train/loss"].detach().clone())


def trainer_for(callbacks: list[Callback], **more: Any) -> Trainer:
    settings = {"max_epochs": 2, "limit_train_batches": STEPS, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", callbacks=callbacks, **{"devices": 1, **settings, **quiet, **more})


def fit(
    case: Case, folder: Path, callbacks: list[Callback], optimizer: Any = sgd, seed: int = 0, **more: Any
) -> tuple[Method, Trainer, Counter[str]]:
    """A fitted method, its trainer, and how often it attacked and ended a step."""
    seed_everything(seed, verbose=False)
    method = case.build(optimizer, folder)
    counts: Counter[str] = Counter()
    for name in ("craft", "after_step"):
        original = getattr(method, name)

        def counted(*arguments: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **named)

        setattr(method, name, counted)
    ckpt_path = more.pop("ckpt_path", None)
    trainer = trainer_for(callbacks, **more)
    data = DigitsDataModule(batch_size=8, eval_batch_size=32)
    trainer.fit(method, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return method, trainer, counts


def refused(case: Case, callbacks: list[Callback]) -> str | None:
    reasons = case.refuses or {}
    return next((reasons[type(c).__name__] for c in callbacks if type(c).__name__ in reasons), None)


def check_steps(case: Case, folder: Path, callbacks: list[Callback], **more: Any) -> Method:
    losses = Losses()
    method, _, counts = fit(case, folder, [*callbacks, losses], **more)
    accumulate = more.get("accumulate_grad_batches", 1)
    batches = 2 * STEPS
    if not case.trains:
        return method
    assert counts["craft"] in (0, batches * case.replays), "one attack a batch"
    if type(method).after_step is not Method.after_step:
        assert counts["after_step"] == batches // accumulate, "the state moves once a step"
    assert len(losses.seen) == batches and all(loss.isfinite() for loss in losses.seen)
    assert all(p.isfinite().all() for p in method.parameters())
    return method


@pytest.mark.parametrize(("name", "combination"), every_combination())
def test_every_method_with_every_combination(name: str, combination: str, ingredients: Path, tmp_path: Path) -> None:
    case, callbacks = METHODS[name], COMBINATIONS[combination]
    reason = refused(case, callbacks())
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            fit(case, ingredients, callbacks(), default_root_dir=tmp_path)
        return
    check_steps(case, ingredients, callbacks(), default_root_dir=tmp_path)
    check_weights_come_back(case, ingredients, callbacks, tmp_path)
    if case.trains:
        check_resumed(case, ingredients, callbacks, tmp_path)


def check_weights_come_back(case: Case, folder: Path, callbacks: Callable[[], list[Callback]], root: Path) -> None:
    if case.moves:
        return
    seed_everything(0, verbose=False)
    before = {name: p.detach().clone() for name, p in case.build(still, folder).named_parameters()}
    method, _, _ = fit(case, folder, callbacks(), still, max_epochs=1, default_root_dir=root)
    for name, parameter in method.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} moved though the learning rate is 0"


def check_resumed(case: Case, folder: Path, callbacks: Callable[[], list[Callback]], root: Path) -> None:
    _, whole, _ = fit(case, folder, callbacks(), default_root_dir=root)
    whole.save_checkpoint(root / "whole.ckpt")
    _, stopped, _ = fit(case, folder, [*callbacks(), StopAfterEpoch()], default_root_dir=root)
    assert stopped.current_epoch == 1
    stopped.save_checkpoint(root / "stopped.ckpt")
    # Another seed, so that all that is equal comes from the checkpoint.
    _, resumed, _ = fit(case, folder, callbacks(), seed=1, ckpt_path=root / "stopped.ckpt", default_root_dir=root)
    resumed.save_checkpoint(root / "resumed.ckpt")
    first, second = (torch.load(root / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    for key in ("state_dict", "robust_pl_averages", "optimizer_states"):
        assert_equal(first.get(key), second.get(key), key)


def assert_equal(a: Any, b: Any, where: str) -> None:
    """The same tree of tensors and numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("more", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=["accumulate", "bf16"])
def test_the_same_accumulated_and_in_bf16(
    name: str, combination: str, more: dict[str, Any], ingredients: Path, tmp_path: Path
) -> None:
    case, callbacks = METHODS[name], COMBINATIONS[combination]()
    reason = refused(case, callbacks)
    if "accumulate_grad_batches" in more and case.accumulates is not None:
        reason = case.accumulates
    if reason is not None:
        with pytest.raises((ValueError, MisconfigurationException), match=reason):
            fit(case, ingredients, callbacks, default_root_dir=tmp_path, **more)
        return
    check_steps(case, ingredients, callbacks, default_root_dir=tmp_path, **more)


@pytest.mark.slow
def test_the_same_on_two_processes(ingredients: Path, tmp_path: Path) -> None:
    """One launch for the whole table: equal weights on both, and as many attacks as batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.two_processes"]
    done = subprocess.run(
        [*command, str(ingredients), str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(METHODS) * len(COMBINATIONS)
    failed = [f"{r['name']} with {r['combination']}: {r['error']}" for r in results if r["error"]]
    assert not failed, "\n".join(failed)
    from .two_processes import PERTURBATIONS, linear_fit

    for name, perturbation in PERTURBATIONS.items():
        one = linear_fit(perturbation(), tmp_path, batch_size=16).net.state_dict()
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for key in one:
            assert torch.allclose(one[key], two[key], atol=1e-12, rtol=0), f"{name}: {key} is not that of one process"
