"""What makes an evaluation the one that it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from ...metrics.scoreboard import CLEAN, Scoreboard
from ..outcome import EvaluationAttack
from .files import sha256_of_tensors


def describe(attack: EvaluationAttack) -> dict[str, Any]:
    """Class and settings of an attack, as far as it keeps what it was constructed with, and those of the attacks in it."""
    settings: dict[str, Any] = {"class": f"{type(attack).__module__}.{type(attack).__qualname__}"}
    for key in inspect.signature(type(attack)).parameters:
        value = getattr(attack, key, None)
        if isinstance(value, Tensor):
            settings[key] = sha256_of_tensors({key: value})
        elif isinstance(value, nn.Module):
            settings[key] = sha256_of_weights(value)
        elif isinstance(value, str | int | float | bool | list | tuple):
            settings[key] = str(value)
    for key, value in vars(attack).items():
        if isinstance(value, EvaluationAttack):
            settings[key] = describe(value)
        elif isinstance(value, dict) and value and all(isinstance(part, EvaluationAttack) for part in value.values()):
            settings[key] = {name: describe(part) for name, part in value.items()}
    return settings


def facts_about(
    model: nn.Module, attacks: Mapping[str, EvaluationAttack], data: LightningDataModule | None = None
) -> dict[str, Any]:
    """Sums and sizes that tell one network, one data set and one threat model from another."""
    facts: dict[str, Any] = {"weights": sha256_of_weights(model)}
    facts["threats"] = {name: {"norm": a.norm, "eps": _number(getattr(a, "eps", None))} for name, a in attacks.items()}
    test_set = getattr(data, "test_set", None)
    if test_set is not None:
        x, y = test_set.read(torch.arange(min(16, len(test_set))), None)
        facts |= {"samples": len(test_set), "first_16": sha256_of_tensors({"x": x, "y": y})}
    return facts


def sha256_of_weights(model: nn.Module) -> str:
    """Sum of a network's tensors in their order; not of their names, which a wrapper changes."""
    return sha256_of_tensors({f"{place:06d}": tensor for place, tensor in enumerate(model.state_dict().values())})


def _number(eps: Any) -> str | None:
    """A radius as it was written; None if there is none or each sample has its own."""
    return None if eps is None or isinstance(eps, Tensor) else str(eps)


def replay(board: Scoreboard, columns: Mapping[str, Tensor], seconds: Mapping[str, float], device: torch.device) -> None:
    """Count a stored batch as if it had just been evaluated."""
    columns = {name: column.to(device) for name, column in columns.items()}
    right = {CLEAN: columns["prediction"] == columns["label"]}
    right |= {name: columns[f"right_{name}"] for name in board.attacks}
    cost = {
        name: (int(columns[f"forwards_{name}"].sum()), int(columns[f"backwards_{name}"].sum()), seconds[name])
        for name in board.attacks
    }
    board.update(columns["label"], right, cost, columns["loss"])
