"""Bring a network into the state that an attack needs, and put everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from ...nets.frozen import Frozen
from ...nets.statistics import untracked

BNMode = Literal["eval", "train", "train_no_track"]
BN_MODES: tuple[str, ...] = ("eval", "train", "train_no_track")


def _is_frozen(module: nn.Module) -> bool:
    if isinstance(module, Frozen):
        return True
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _unfrozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    if not _is_frozen(module):
        yield module
        for child in module.children():
            yield from _unfrozen_modules(child)


@contextmanager
def prepared(model: nn.Module, bn_mode: BNMode, frozen: bool = True) -> Iterator[None]:
    """Gradients on, inference mode off, parameters frozen, modes as ``bn_mode`` says; afterwards all as it was.

    Args:
        model: the network under attack.
        bn_mode: ``eval`` puts every submodule in eval mode. ``train`` puts those that are not frozen in train mode, so
            that the attack's passes move BatchNorm's running statistics (Rice 2020, Fast-AT). ``train_no_track`` does
            the same and leaves the statistics alone (Wang 2023). In both, dropout draws from the global random stream,
            as it does in training. Published codes differ; see the method's paper.
        frozen: False leaves the parameters as they are, for a pass that a training loss will use, too.
    """
    with ExitStack() as undo:
        # First, since what is cloned below in inference mode could not be written to.
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_modes_restored(model))
        if bn_mode == "eval":
            for module in model.modules():
                module.training = False
        else:
            unfrozen = list(_unfrozen_modules(model))
            for module in unfrozen:
                module.training = True
            if bn_mode == "train_no_track":
                undo.enter_context(untracked(unfrozen))
        if frozen:
            undo.enter_context(_parameters_frozen(model))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode that it was in."""
    with _modes_restored(model):
        model.eval()
        yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _parameters_frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
