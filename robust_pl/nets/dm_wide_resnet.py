"""DeepMind's variants of the wide and the pre-activation ResNet, which much of RobustBench's top uses.

They differ from ours in the names of their tensors and where they halve the resolution: a 3 x 3 convolution of stride 2 pads
only to the right and below, as TensorFlow's ``SAME`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import ImageClassifier
from .wide_resnet import ACTIVATIONS, Activation, blocks_of, check_activation


def _pad(z: Tensor, stride: int) -> Tensor:
    return F.pad(z, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class DMWideBlock(nn.Module):
    """Pre-activation block; a projecting shortcut reads the activated input, an identity shortcut the raw one."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.act, self.stride = ACTIVATIONS[activation](), stride
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        self.conv_0 = nn.Conv2d(in_planes, planes, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(planes)
        self.conv_1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, z: Tensor) -> Tensor:
        active = self.act(self.batchnorm_0(z))
        out = self.act(self.batchnorm_1(self.conv_0(_pad(active, self.stride))))
        return self.conv_1(out) + (z if self.shortcut is None else self.shortcut(active))


class DMStage(nn.Module):
    """A run of blocks of equal width, the first of which may halve the resolution."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int, activation: Activation) -> None:
        super().__init__()
        first = DMWideBlock(in_planes, planes, stride, activation)
        self.block = nn.Sequential(first, *(DMWideBlock(planes, planes, 1, activation) for _ in range(blocks - 1)))

    def forward(self, z: Tensor) -> Tensor:
        return self.block(z)


class DMWideResNet(ImageClassifier):
    """Wide ResNet as in Gowal et al. 2020 (arXiv:2010.03593), Rebuffi et al. 2021 and Wang et al. 2023.

    As many parameters as :class:`WideResNet`. Tensor names ``init_conv``, ``layer.0.block.0.batchnorm_0``,
    ``layer.0.block.0.shortcut``, ``batchnorm``, ``logits``.

    Args:
        num_classes: the number K of classes.
        depth: 6 n + 4 for n blocks a stage.
        widen_factor: the stages have 16, 32 and 64 times this many channels.
        activation: ``silu`` (swish) or ``relu``.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if ``depth`` is not 6 n + 4, or ``activation`` is none of the above.
    """

    head_name = "logits"

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 28,
        widen_factor: int = 10,
        activation: Activation = "silu",
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        blocks = blocks_of(depth)
        check_activation(activation)
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.init_conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            DMStage(blocks, 16, widths[0], 1, activation),
            DMStage(blocks, widths[0], widths[1], 2, activation),
            DMStage(blocks, widths[1], widths[2], 2, activation),
        )
        self.batchnorm = nn.BatchNorm2d(widths[2])
        self.act = ACTIVATIONS[activation]()
        self.logits = nn.Linear(widths[2], num_classes)

    def features(self, z: Tensor) -> Tensor:
        return self.act(self.batchnorm(self.layer(self.init_conv(z)))).mean((2, 3))


class DMPreActBlock(nn.Module):
    """Pre-activation block whose projecting shortcut is a 3 x 3 convolution of the raw input."""

    def __init__(self, in_planes: int, planes: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.act, self.stride = ACTIVATIONS[activation](), stride
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        self.conv_2d_1 = nn.Conv2d(in_planes, planes, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(planes)
        self.conv_2d_2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        projects = stride != 1 or in_planes != planes
        self.shortcut = nn.Conv2d(in_planes, planes, 3, stride, bias=False) if projects else None

    def forward(self, z: Tensor) -> Tensor:
        out = self.conv_2d_1(_pad(self.act(self.batchnorm_0(z)), self.stride))
        out = self.conv_2d_2(self.act(self.batchnorm_1(out)))
        return out + (z if self.shortcut is None else self.shortcut(_pad(z, self.stride)))


class DMPreActResNet18(ImageClassifier):
    """Pre-activation ResNet-18 as in Rebuffi et al. 2021 (arXiv:2103.01946); 12,548,426 parameters for 10 classes.

    Tensor names ``conv_2d``, ``layer_0.0.batchnorm_0``, ``layer_1.0.shortcut``, ``batchnorm``, ``logits``.

    Args:
        num_classes: the number K of classes.
        activation: ``silu`` (swish) or ``relu``.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if ``activation`` is none of the above.
    """

    head_name = "logits"

    def __init__(
        self,
        num_classes: int = 10,
        activation: Activation = "silu",
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        check_activation(activation)

        def stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                DMPreActBlock(in_planes, planes, stride, activation), DMPreActBlock(planes, planes, 1, activation)
            )

        self.conv_2d = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.layer_0 = stage(64, 64, 1)
        self.layer_1 = stage(64, 128, 2)
        self.layer_2 = stage(128, 256, 2)
        self.layer_3 = stage(256, 512, 2)
        self.batchnorm = nn.BatchNorm2d(512)
        self.act = ACTIVATIONS[activation]()
        self.logits = nn.Linear(512, num_classes)

    def features(self, z: Tensor) -> Tensor:
        z = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(z)))))
        return self.act(self.batchnorm(z)).mean((2, 3))
