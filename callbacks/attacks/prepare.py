"""Bring a network into the state that an attack needs, and put everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

BNMode = Literal["eval", "train", "train_no_track"]
BN_MODES: tuple[str, ...] = ("eval", "train", "train_no_track")


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _unfrozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    if not _is_frozen(module):
        yield module
        for child in module.children():
            yield from _unfrozen_modules(child)


@contextmanager
def prepared(model: nn.Module, bn_mode: BNMode) -> Iterator[None]:
    """Gradients on, inference mode off, parameters frozen, modes as ``bn_mode`` says; afterwards all as it was.

    Args:
        model: the network under attack.
        bn_mode: ``eval`` puts every submodule in eval mode. ``train`` puts those that are not frozen in train mode, so that
            the attack's passes move BatchNorm's running statistics (Rice 2020, Fast-AT). ``train_no_track`` does the same
            and leaves the statistics alone (Wang 2023). Published codes differ; see the method's paper.
    """
    modes = [(module, module.training) for module in model.modules()]
    untracked: list[_NormBase] = []
    if bn_mode == "eval":
        for module, _ in modes:
            module.training = False
    else:
        for module in _unfrozen_modules(model):
            module.training = True
        if bn_mode == "train_no_track":
            untracked = [m for m, _ in modes if isinstance(m, _NormBase) and m.training and m.track_running_stats]
            for module in untracked:
                module.track_running_stats = False
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in untracked:
            module.track_running_stats = True
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
