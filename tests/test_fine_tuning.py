"""Adversarial fine-tuning: the schedule by numbers, and where it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from robust_pl.callbacks import PGD
from robust_pl.methods import PGDAT, AdversarialFineTuning, SlowStartFastDecay
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, rates
from .test_resume import assert_same_weights


def test_the_schedule_by_numbers() -> None:
    # A rise over 2 of 8 steps from 0.1, then 6 steps to 1e-4, which the ninth would have.
    wanted = [0.1, 0.55, *(10 ** (-4 * t / 6) for t in range(6))]
    assert rates(SlowStartFastDecay(), 8) == pytest.approx(wanted, rel=1e-12)
    # The rise may end inside a step: after 1.5 of 5 steps.
    wanted = [0.2, 0.2 + 0.8 / 1.5, *(0.01 ** ((t - 1.5) / 3.5) for t in (2, 3, 4))]
    assert rates(SlowStartFastDecay(warmup=0.3, start=0.2, end=0.01), 5) == pytest.approx(wanted, rel=1e-12)
    assert rates(SlowStartFastDecay(warmup=0, end=0.01), 4) == pytest.approx([10 ** (-t / 2) for t in range(4)], rel=1e-12)
    assert rates(SlowStartFastDecay(warmup=0.5, start=1, end=1), 6) == [1] * 6


def test_the_schedule_goes_on_from_its_state() -> None:
    def scheduler() -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return SlowStartFastDecay().build(optimizer, 8)

    one, other = scheduler(), scheduler()
    for _ in range(5):
        one.optimizer.step()
        one.step()
    other.load_state_dict(one.state_dict())
    one.step()
    other.step()
    assert one.get_last_lr() == other.get_last_lr() == pytest.approx([0.5 * 10 ** (-4 * 4 / 6)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlowStartFastDecay(warmup=1.0), "warmup=1.0"),
        (lambda: SlowStartFastDecay(warmup=-0.1), "warmup=-0.1"),
        (lambda: SlowStartFastDecay(start=0), "start=0"),
        (lambda: SlowStartFastDecay(end=2), "end=2"),
        (lambda: AdversarialFineTuning(SmallCNN()), "starts from a trained network"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_it_is_adversarial_training_from_the_weights(tmp_path: Path) -> None:
    """One and the same as PGDAT that starts there, with the schedule."""
    torch.manual_seed(0)
    torch.save(SmallCNN(width=4).state_dict(), tmp_path / "net.pt")
    trained = []
    for build, schedule in ((PGDAT, SlowStartFastDecay()), (AdversarialFineTuning, None)):
        method = build(
            SmallCNN(width=4),
            PGD(steps=2),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            schedule=schedule,
            weights=str(tmp_path / "net.pt"),
        )
        Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(method, loader())
        trained.append(method.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    start = torch.load(tmp_path / "net.pt", weights_only=True)
    assert any(not torch.equal(value, trained[1][f"net.{name}"]) for name, value in start.items())


def test_resumed_equals_uninterrupted(robust_pl: Callable[..., None], tiny: Path) -> None:
    torch.save(SmallCNN(width=4).state_dict(), "net.pt")
    common = ("fit", "-c", tiny, "--model", "AdversarialFineTuning", "--model.init_args.schedule", "null")
    common = (*common, "--model.init_args.weights", "net.pt", "--trainer.max_epochs", 2)
    robust_pl(*common, "--run.name", "whole")
    robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    Path("net.pt").unlink()  # not needed any more
    robust_pl(*common, "--ckpt_path", "runs/stopped/checkpoints/last.ckpt")
    assert_same_weights(Path("runs/whole/checkpoints/last.ckpt"), Path("runs/stopped/checkpoints/last.ckpt"))
