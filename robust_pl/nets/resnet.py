"""ResNet-18 and ResNet-50 for 32 x 32 images: a 3 x 3 stem without pooling, the usual one on CIFAR."""

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


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut, four times as many channels out as inside."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != 4 * planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, z: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(z)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(z))


class ResNet(ImageClassifier):
    """Four stages of 64, 128, 256 and 512 channels (He et al. 2016, arXiv:1512.03385) with CIFAR's 3 x 3 stem.

    Tensor names ``conv1``, ``bn1``, ``layer1.0.conv1``, ``layer2.0.shortcut.0``, ``linear``, as in the public CIFAR
    collections. A subclass says which blocks, and how many a stage.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.
    """

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, int, int, int]
    expansion: int
    """Channels that leave a block for each channel of its stage."""

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
        self.layer1 = self._stage(64, 64, self.blocks[0], stride=1)
        self.layer2 = self._stage(64 * self.expansion, 128, self.blocks[1], stride=2)
        self.layer3 = self._stage(128 * self.expansion, 256, self.blocks[2], stride=2)
        self.layer4 = self._stage(256 * self.expansion, 512, self.blocks[3], stride=2)
        self.linear = nn.Linear(512 * self.expansion, num_classes)

    def _stage(self, in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (self.block(planes * self.expansion, planes) for _ in range(blocks - 1))
        return nn.Sequential(self.block(in_planes, planes, stride), *rest)

    def features(self, z: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(z)))
        return self.layer4(self.layer3(self.layer2(self.layer1(z)))).mean((2, 3))


class ResNet18(ResNet):
    """ResNet-18 (He et al. 2016, arXiv:1512.03385) with CIFAR's 3 x 3 stem; 11,173,962 parameters for 10 classes."""

    block, blocks, expansion = BasicBlock, (2, 2, 2, 2), 1


class ResNet50(ResNet):
    """ResNet-50 (He et al. 2016, arXiv:1512.03385) with CIFAR's 3 x 3 stem; 23,520,842 parameters for 10 classes."""

    block, blocks, expansion = Bottleneck, (3, 4, 6, 3), 4
