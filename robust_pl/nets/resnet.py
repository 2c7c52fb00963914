"""ResNet-18 for 32 x 32 images: a 3 x 3 stem without pooling, the usual one on CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, ReLU after the sum (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, z: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(z)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(z))


class ResNet18(ImageClassifier):
    """ResNet-18 (He et al. 2016, arXiv:1512.03385) with CIFAR's 3 x 3 stem; 11,173,962 parameters for 10 classes.

    Stages of 64, 128, 256 and 512 channels, two blocks each; tensor names ``conv1``, ``bn1``, ``layer1.0.conv1``,
    ``layer2.0.shortcut.0``, ``linear``, as in the public CIFAR collections.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.linear = nn.Linear(512, num_classes)

    def features(self, z: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(z)))
        return self.layer4(self.layer3(self.layer2(self.layer1(z)))).mean((2, 3))
