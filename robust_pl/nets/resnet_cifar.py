"""The thin ResNets that He et al. designed for CIFAR: ResNet-20, 32, 44 and 56 with parameter-free shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier


class PadShortcut(nn.Module):
    """Shortcut option A (He et al. 2016, section 3.3): take every second pixel and add channels of zeros.

    The zeros go half before and half behind the channels that exist.
    """

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        self.before = (planes - in_planes) // 2
        self.behind = planes - in_planes - self.before

    def forward(self, z: Tensor) -> Tensor:
        return F.pad(z[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class ThinBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters, ReLU after the sum."""

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        grows = in_planes != planes
        self.conv1 = nn.Conv2d(in_planes, planes, 3, 2 if grows else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = PadShortcut(in_planes, planes) if grows else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(z)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(z))


class ThinResNet(ImageClassifier):
    """Three stages of 16, 32 and 64 channels with ``blocks`` blocks each (He et al. 2016, arXiv:1512.03385, 4.2).

    Tensor names ``conv1``, ``bn1``, ``layer1.0.conv1``, ``linear``. Convolutions and the head start from He et al.'s
    normal initialisation.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.
    """

    blocks: int

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16)
        self.layer2 = self._stage(16, 32)
        self.layer3 = self._stage(32, 64)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, in_planes: int, planes: int) -> nn.Sequential:
        rest = (ThinBlock(planes, planes) for _ in range(self.blocks - 1))
        return nn.Sequential(ThinBlock(in_planes, planes), *rest)

    def features(self, z: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(z)))
        return self.layer3(self.layer2(self.layer1(z))).mean((2, 3))


class ResNet20(ThinResNet):
    """CIFAR ResNet-20 (He et al. 2016, arXiv:1512.03385), shortcut option A; 269,722 parameters for 10 classes."""

    blocks = 3


class ResNet32(ThinResNet):
    """CIFAR ResNet-32 (He et al. 2016, arXiv:1512.03385), shortcut option A; 464,154 parameters for 10 classes."""

    blocks = 5


class ResNet44(ThinResNet):
    """CIFAR ResNet-44 (He et al. 2016, arXiv:1512.03385), shortcut option A; 658,586 parameters for 10 classes."""

    blocks = 7


class ResNet56(ThinResNet):
    """CIFAR ResNet-56 (He et al. 2016, arXiv:1512.03385), shortcut option A; 853,018 parameters for 10 classes."""

    blocks = 9
