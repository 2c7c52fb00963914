"""Channels that recognise a perturbation: statistics by hand, and a planted one that decides alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_pl.callbacks.monitors.channels import channel_differentiation
from robust_pl.functional.channels import bimodality, channel_norms, channel_ratio


def test_ratio_and_norms_by_hand() -> None:
    clean = torch.tensor([[[[1.0, -1.0]], [[2.0, 4.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    attacked = torch.tensor([[[[3.0, -1.0]], [[1.0, 0.5]], [[0.0, 0.0]]]], dtype=torch.float64)
    assert torch.allclose(channel_ratio(attacked, clean), torch.tensor([2.0, 0.25, 1.0]).double(), atol=1e-8)
    weight = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    assert channel_norms(weight).tolist() == [5.0, 2.0]


def test_bimodality_by_hand() -> None:
    assert bimodality(torch.tensor([0.0, 0.0, 1.0, 1.0])).item() == pytest.approx(1.0, abs=1e-8)
    # 0, 1, 2: variance 2/3, skewness 0, kurtosis (2/3) / (2/3)^2 = 1.5
    assert bimodality(torch.tensor([0.0, 1.0, 2.0])).item() == pytest.approx(1 / 1.5, abs=1e-8)
    assert bimodality(torch.linspace(0, 1, 100_001)).item() == pytest.approx(5 / 9, abs=1e-4)
    assert bimodality(torch.full((4,), 7.0)).item() == 0.0


class Planted(nn.Module):
    """Channel 0 sees brightness, channel 1 a pattern of alternating signs, which beats it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, stride=2, bias=False)
        pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        self.conv.weight.data = torch.stack([torch.ones(2, 2), 100 * pattern]).unsqueeze(1)
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        bright, alternates = self.drop(self.conv(x)).mean((2, 3)).unbind(1)
        return torch.stack([bright, 3 + alternates], 1)


def test_a_channel_that_decides_alone_under_attack_is_found() -> None:
    net = Planted()
    x = torch.full((4, 1, 4, 4), 0.9)
    delta = 0.01 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    y = torch.zeros(4, dtype=torch.int64)
    found = channel_differentiation(net, x, x + delta, y, top=1)["conv"]
    assert found.accuracy == 0.0 and found.accuracy_without == 1.0
    assert found.dominant == 1 and found.suppressed == 0
    assert found.ratio[0].item() == pytest.approx(1.0, abs=1e-6)
    assert found.norms.tolist() == [2.0, 200.0]
    assert net.training and not net.conv._forward_hooks
    with pytest.raises(ValueError, match="top=0"):
        channel_differentiation(net, x, x, y, top=0)
