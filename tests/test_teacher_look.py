"""The look at teachers before the first step: what it measures, and what it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from robust_pl.callbacks import PGD
from robust_pl.methods import MTARD, RSLAD
from robust_pl.nets import Teacher

from .test_distillation import ATTACK, Plane, fit, net, sgd


def confident() -> Plane:
    """A linear classifier without robustness, so sure of itself that its cross-entropy has no gradient."""
    plane = Plane()
    with torch.no_grad():
        plane.linear.weight.mul_(100)
        plane.linear.bias.mul_(100)
    return plane


@pytest.mark.parametrize("build", [confident, lambda: Teacher(confident(), "float16")])
def test_a_confident_teacher_is_not_taken_for_a_robust_one(build: Callable[[], torch.nn.Module]) -> None:
    with pytest.warns(UserWarning, match=r"teacher is right on (\d|1\d)\.\d% .* under PGD-10 .* lacks the robustness"):
        fit(RSLAD(net(0), build(), PGD(0.3, steps=1), optimizer=sgd))


def test_one_teacher_given_twice_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="teacher and clean_teacher say the same of 144 validation images: give two"):
        fit(MTARD(net(0), net(1), net(1), PGD(**ATTACK), optimizer=sgd))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*say the same")
        fit(MTARD(net(0), net(1), net(2), PGD(**ATTACK), optimizer=sgd))
