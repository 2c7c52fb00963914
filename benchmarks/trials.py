"""How runs are tested: on which images, under which attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runs import ROOT


@dataclass(frozen=True)
class Trial:
    """One test: a name, its attacks, further options of the command."""

    name: str
    attacks: Mapping[str, Any]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Where the configs lie, ``{}`` standing for the method, and how their runs are tested; a later trial's figures add up."""

    configs: str
    trials: tuple[Trial, ...]

    def config(self, method: str) -> Path:
        """The file."""
        return ROOT / self.configs.format(method)

    def command(self, method: str) -> str:
        """What trains it."""
        return f"robust-pl fit -c {self.configs.format(method)} --run.name {method}"


def _attack(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


SETTINGS = {
    "digits": Setting(
        "configs/digits/{}.yaml",
        (
            Trial(
                "autoattack",
                {"pgd20": _attack("PGD", eps=0.2, steps=20), "autoattack": _attack("AutoAttack", eps=0.2, batch_size=360)},
                ("--data.init_args.eval_batch_size", "360"),
            ),
        ),
    ),
    "cifar10": Setting(
        "configs/cifar10/{}_cpu.yaml",
        (
            Trial(
                "pgd20",
                {"pgd20": _attack("PGD", eps="8/255", step_size="2/255", steps=20)},
                ("--data.init_args.eval_batch_size", "250", "--trainer.limit_test_batches", "8"),
            ),
            Trial(
                "autoattack",
                {"autoattack": _attack("AutoAttack", eps="8/255", batch_size=250)},
                ("--data.init_args.eval_batch_size", "250", "--trainer.limit_test_batches", "1"),
            ),
        ),
    ),
}
