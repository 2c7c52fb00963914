"""What AutoAttack says about networks on which its figure would mislead."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .problem import Problem

_DIFFERENCE = 1e-4
_SQUARE_GAIN = 0.002
_GRADIENTS = ("grad", "backward", "_make_grads")


class AutoAttackWarning(UserWarning):
    """A reason to doubt a robust accuracy.

    Args:
        flag: ``randomized``, ``dynamic``, ``zero-gradient`` or ``square``.
        message: what was seen, and what to do.
    """

    def __init__(self, flag: str, message: str) -> None:
        super().__init__(message)
        self.flag = flag


def check_classes(parts: Collection[str], classes: int, version: str, n_targets: Mapping[str, int]) -> None:
    """Refuse a network that has too few classes for one of the parts.

    Raises:
        ValueError: which part needs how many, and what to do.
    """
    for name in parts:
        needed = {"apgd-dlr": 3, "apgd-t": 4}.get(name, 2)
        if classes < needed:
            raise ValueError(
                f"version={version!r} runs {name}, which compares {needed} logits, and the network has {classes} classes: set "
                "version='custom' with attacks=['apgd-ce', 'fab', 'square']"
            )
        if n_targets.get(name, 0) >= classes:
            raise ValueError(
                f"version={version!r} runs {name} with n_targets={n_targets[name]}, and the network has {classes} classes: set "
                f"n_targets={classes - 1}, or version='custom' without {name}"
            )


def warn_of_unusual_networks(problem: Problem, logits: Tensor) -> None:
    """Warn of a network that answers at random, or takes gradients to answer; one forward pass over the first images.

    Args:
        problem: the problem.
        logits: of its first images, (n, K).
    """
    part = problem.rows(torch.arange(len(logits), device=logits.device))
    with _gradients_seen() as seen:
        again = part.logits(part.x)
    if seen:
        _warn("dynamic", "the network takes gradients in its forward pass: its defence may adapt to what AutoAttack tries")
    difference = torch.nn.functional.normalize(again) - torch.nn.functional.normalize(logits)
    if (again.argmax(1) != logits.argmax(1)).any() or difference.norm(dim=1).max() > _DIFFERENCE:
        _warn("randomized", "the network gives the same images different logits: set version='rand'")


def warn_of_zero_gradients(gradient: Tensor) -> None:
    """Warn if there are samples whose gradient (B, C, H, W) is zero all over."""
    zero = int((gradient == 0).flatten(1).all(1).sum())
    if zero:
        _warn("zero-gradient", f"{zero} of {len(gradient)} samples have no gradient at the start: attacks that need it fail")


def warn_of_square(robust: Mapping[str, Tensor]) -> None:
    """Warn if random search breaks what the gradient attacks before it did not.

    Args:
        robust: part -> which samples stand after it, bool (B,), in order.
    """
    names = list(robust)
    if "square" in names and len(names) > 2:
        before, after = (robust[names[names.index("square") - back]].float().mean().item() for back in (1, 0))
        if after < before - _SQUARE_GAIN:
            _warn(
                "square",
                f"square lowers the robust accuracy from {before:.2%} to {after:.2%}, where gradients failed: they may be "
                "masked, so run square with more queries and restarts, or an adaptive attack",
            )


def _warn(flag: str, message: str) -> None:
    warnings.warn(AutoAttackWarning(flag, message), stacklevel=2)


@contextmanager
def _gradients_seen() -> Iterator[list[str]]:
    """Names of the functions called in between that take gradients."""
    seen: list[str] = []
    before = sys.getprofile()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name in _GRADIENTS:
            seen.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)
