"""A ResNet of 112,006 parameters without BatchNorm, small enough for complete verifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier


class VerifiableBlock(nn.Module):
    """Two 3 x 3 convolutions with bias around a shortcut, ReLU after the sum; no normalisation layers."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride))

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(z))) + self.shortcut(z))


class ResNet2B(ImageClassifier):
    """The two-block ResNet of the neural-network verification benchmarks (Wang et al. 2021, arXiv:2103.06624).

    112,006 parameters for 10 classes; images of 32 x 32 pixels. Tensor names ``conv1``, ``layer1.0.conv1``,
    ``layer1.0.shortcut.0``, ``linear1``, ``linear2``.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if an input is not 32 x 32, because the first linear layer reads all positions.
    """

    head_name = "linear2"

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(VerifiableBlock(8, 16, stride=2), VerifiableBlock(16, 16))
        self.linear1 = nn.Linear(16 * 8 * 8, 100)
        self.linear2 = nn.Linear(100, num_classes)

    def features(self, z: Tensor) -> Tensor:
        if z.shape[2:] != (32, 32):
            raise ValueError(f"ResNet2B takes images of 32 x 32 pixels, got {z.shape[2]} x {z.shape[3]}")
        z = self.layer1(F.relu(self.conv1(z)))
        return F.relu(self.linear1(z.flatten(1)))
