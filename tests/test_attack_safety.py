"""Ways in which an attack could look weaker than it is, or leave something behind: each was a bug once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust_pl.callbacks import FGSM, PGD, Attack
from robust_pl.callbacks.attacks.problem import Objective
from robust_pl.functional import geometry
from robust_pl.functional.ratio import Ratio

X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_an_attack_that_writes_into_x_is_caught():
    class InPlace(Attack):
        def perturb(self, problem, x, y):
            x += 0.5 * (x < 0.4)
            return x

    with pytest.raises(ValueError, match="InPlace left its ball"):
        InPlace(0.1)(linear(), X, Y)


def test_a_result_of_another_shape_is_caught():
    class Short(Attack):
        def perturb(self, problem, x, y):
            return x[:1]

    with pytest.raises((ValueError, TypeError), match="Short"):
        Short(1.0)(linear(), X, Y)


@pytest.mark.parametrize("scale", [1e-13, 1e-20, 1e-30])
def test_tiny_gradients_have_a_direction(scale):
    direction = geometry.steepest(scale * torch.randn(2, 1, 4, 4), "l2")
    torch.testing.assert_close(geometry.size(direction, "l2"), torch.ones(2))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0), ("l1", 2.0)])
def test_undefined_gradients_are_reported(norm, eps):
    class Undefined(nn.Module):
        def forward(self, x):
            z = x.flatten(1)
            return z[:, :3] + (z - z).sum(1, keepdim=True).sqrt()

    with pytest.raises(ValueError, match="gradients"):
        PGD(eps, norm=norm, random_start=False)(Undefined(), X, Y)


def test_train_no_track_leaves_instance_norm_alone():
    net = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), linear())
    FGSM(bn_mode="train_no_track")(net, X, Y)
    assert net[0].running_mean.item() == 0.0


def test_the_callers_objective_may_hold_inference_tensors():
    net = linear()
    with torch.inference_mode():
        teacher = torch.rand(8, 3)
        FGSM(0.1).run(net, X, Y, objective=Objective(lambda z, t: (z * t).sum(1), (teacher,)))


def test_targeted_refuses_the_callers_kl():
    with pytest.raises(ValueError, match="target"):
        FGSM(targeted=True, random_start="normal").run(linear(), X, Y, objective="kl")


def test_ratio_refuses_an_open_fraction():
    with pytest.raises(ValueError, match="8/255"):
        Ratio("8/")
