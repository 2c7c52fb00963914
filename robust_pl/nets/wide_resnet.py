"""Wide residual networks for 32 x 32 images, the large networks of the robustness leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier

Activation = Literal["relu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def blocks_of(depth: int) -> int:
    """Blocks a stage of a wide ResNet of ``depth`` layers; ValueError if there is none."""
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder:
        raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34, ...), got {depth}")
    return blocks


def check_activation(activation: str) -> None:
    """Refuse an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


class WideBlock(nn.Module):
    """Pre-activation block with dropout between its convolutions (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

    A projecting shortcut reads the activated input, an identity shortcut the raw one.
    """

    def __init__(self, in_planes: int, planes: int, stride: int, activation: Activation, drop_rate: float) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]()
        self.drop_rate = drop_rate
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        # The published weights call it so.
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, z: Tensor) -> Tensor:
        active = self.act(self.bn1(z))
        out = self.act(self.bn2(self.conv1(active)))
        out = self.conv2(F.dropout(out, self.drop_rate, self.training))
        return out + (z if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """A run of blocks of equal width, the first of which may halve the resolution."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int, activation: Activation, drop_rate: float) -> None:
        super().__init__()
        first = WideBlock(in_planes, planes, stride, activation, drop_rate)
        rest = (WideBlock(planes, planes, 1, activation, drop_rate) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z)


class WideResNet(ImageClassifier):
    """Wide ResNet (Zagoruyko & Komodakis 2016, arXiv:1605.07146) as in TRADES' code (arXiv:1901.08573).

    For 10 classes 28-10 has 36,479,194 parameters, 34-10 46,160,474 and 70-16 266,796,506. Tensor names ``conv1``,
    ``block1.layer.0.bn1``, ``block1.layer.0.convShortcut``, ``bn1``, ``fc``. TRADES' code also builds a stage
    ``sub_block1`` that its forward pass never uses; here there is none.

    Args:
        num_classes: the number K of classes.
        depth: 6 n + 4 for n blocks a stage.
        widen_factor: the stages have 16, 32 and 64 times this many channels.
        activation: ``relu``, or ``silu`` (swish) as in Gowal et al. 2020 (arXiv:2010.03593).
        drop_rate: dropout probability inside the blocks, in [0, 1).
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if ``depth`` is not 6 n + 4, or ``activation`` or ``drop_rate`` is none of the above.
    """

    head_name = "fc"

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 28,
        widen_factor: int = 10,
        activation: Activation = "relu",
        drop_rate: float = 0.0,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        blocks = blocks_of(depth)
        check_activation(activation)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, widths[0], 1, activation, drop_rate)
        self.block2 = WideStage(blocks, widths[0], widths[1], 2, activation, drop_rate)
        self.block3 = WideStage(blocks, widths[1], widths[2], 2, activation, drop_rate)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.act = ACTIVATIONS[activation]()
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def features(self, z: Tensor) -> Tensor:
        z = self.block3(self.block2(self.block1(self.conv1(z))))
        return self.act(self.bn1(z)).mean((2, 3))
