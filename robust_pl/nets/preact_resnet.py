"""Pre-activation ResNet-18 for 32 x 32 images, the network of much of the adversarial-training literature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier

Variant = Literal["rice2020", "wong2020"]
_VARIANTS = ("rice2020", "wong2020")


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3 x 3 convolutions (He et al. 2016, arXiv:1603.05027).

    A projecting shortcut reads the activated input, unless ``raw_shortcut``; an identity shortcut the raw one.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1, raw_shortcut: bool = False) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        active = F.relu(self.bn1(z))
        residual = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return residual + (z if self.shortcut is None else self.shortcut(z if self.raw_shortcut else active))


class PreActResNet18(ImageClassifier):
    """Pre-activation ResNet-18 (He et al. 2016, arXiv:1603.05027); 11,172,170 parameters for 10 classes.

    Two variants are public, and the weights of one do not fit the other. That of Rice et al. 2020 (arXiv:2002.11569) has a
    last BatchNorm and ReLU before the pooling. That of Wong et al. 2020 (arXiv:2001.03994) has none, hence 11,171,146
    parameters, and its projecting shortcuts read the raw input. Tensor names ``conv1``, ``layer1.0.bn1``,
    ``layer2.0.shortcut.0``, ``bn``, ``linear``.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.
        variant: ``rice2020`` or ``wong2020``.

    Raises:
        ValueError: if ``variant`` is neither.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        variant: Variant = "rice2020",
    ) -> None:
        super().__init__(in_channels, mean, std)
        if variant not in _VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, got {variant!r}")
        raw = variant == "wong2020"
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64), PreActBlock(64, 64))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2, raw), PreActBlock(128, 128))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2, raw), PreActBlock(256, 256))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2, raw), PreActBlock(512, 512))
        self.bn = nn.Identity() if raw else nn.BatchNorm2d(512)
        self.act = nn.Identity() if raw else nn.ReLU()
        self.linear = nn.Linear(512, num_classes)

    def features(self, z: Tensor) -> Tensor:
        z = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(z)))))
        return self.act(self.bn(z)).mean((2, 3))
