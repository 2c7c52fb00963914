"""GradAlign with its second point in the box, and with gradients of hard labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robust_pl.callbacks import FGSM
from robust_pl.methods import GradAlign
from robust_pl.methods.fast.grad_align import AlignedExample

from .test_single_step_methods import EPS, Quadratic

A = torch.tensor([1.0, 2.0], dtype=torch.float64)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, 2)


def term(method: GradAlign, example: AlignedExample) -> Tensor:
    """What is added to the cross-entropy."""
    return method.loss(example) - F.cross_entropy(method(example.x_adv), example.y)


def distance(a: Tensor, b: Tensor) -> float:
    return (1 - (a @ b) / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("box", [False, True])
def test_the_second_point_in_the_box(box: bool) -> None:
    x, noise = pixels(0.95, 0.3), pixels(0.3, 0.1)
    method = GradAlign(Quadratic(), FGSM(EPS), lmbda=1.0, box=box, num_classes=2)
    example = method.craft((x, torch.tensor([0]), torch.tensor([0])))
    example.noise = noise
    second = torch.tensor([1.0 if box else 1.25, 0.4], dtype=torch.float64)
    assert term(method, example).item() == pytest.approx(distance(A * x.flatten(), A * second), abs=1e-10)


@pytest.mark.parametrize("objective", [None, "ce", "ce_hard"])
def test_hard_labels_in_the_attack_and_in_the_term(objective: str | None) -> None:
    """The second class has 0.547 at x and 0.553 beside it: with a label of 0.55 the gradient turns round, else it does not."""
    method = GradAlign(Quadratic(), FGSM(EPS, objective=objective), lmbda=1.0, num_classes=2)
    x, y = pixels(0.5, 0.25), torch.tensor([[0.45, 0.55]], dtype=torch.float64)
    example = method.craft((x, y, torch.tensor([0])))
    p = torch.sigmoid((A * x.flatten().square()).sum() / 2)
    gradient = (p - (1.0 if objective == "ce_hard" else 0.55)) * A * x.flatten()
    assert torch.allclose(example.gradient.flatten(), gradient, atol=1e-10)
    example.noise = pixels(0.05, 0.0)
    second = A * torch.tensor([0.55, 0.25], dtype=torch.float64)
    expected = distance(gradient, -second if objective == "ce_hard" else second)
    assert term(method, example).item() == pytest.approx(expected, abs=1e-10)
    assert (expected > 1.9) == (objective != "ce_hard")
    # The cross-entropy that is trained with stays that of the labels given.
    log_p = method(example.x_adv).log_softmax(1)
    plain = method.loss(example) - term(method, example)
    assert plain.item() == pytest.approx(-(y * log_p).sum().item(), abs=1e-10)
