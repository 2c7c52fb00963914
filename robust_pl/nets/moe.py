"""Mixture-of-experts CNNs: ResNet-18, wide ResNets and a small network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .experts import MoEConv, MoENet, Route, narrowed
from .resnet_cifar import ResNet20
from .small_cnn import SmallCNN
from .wide_resnet import blocks_of


class MoEBlock(nn.Module):
    """ResNet's basic block with two convolutions of experts around a shortcut of all, ReLU after the sum."""

    def __init__(self, in_planes: int, planes: int, experts: int, stride: int) -> None:
        super().__init__()
        self.conv1 = MoEConv(in_planes, planes, experts, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = MoEConv(planes, planes, experts)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, z: Tensor, route: Route) -> Tensor:
        out = F.relu(self.bn1(self.conv1(z, route)))
        return F.relu(self.bn2(self.conv2(out, route)) + self.shortcut(z))


class MoEWideBlock(nn.Module):
    """Pre-activation block with two convolutions of experts; a projecting shortcut reads the activated input."""

    def __init__(self, in_planes: int, planes: int, experts: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = MoEConv(in_planes, planes, experts, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = MoEConv(planes, planes, experts)
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, z: Tensor, route: Route) -> Tensor:
        active = F.relu(self.bn1(z))
        out = self.conv2(F.relu(self.bn2(self.conv1(active, route))), route)
        return out + (z if self.shortcut is None else self.shortcut(active))


def _stage(
    block: type[MoEBlock | MoEWideBlock], in_planes: int, planes: int, blocks: int, experts: int, stride: int
) -> nn.ModuleList:
    rest = (block(planes, planes, experts, 1) for _ in range(blocks - 1))
    return nn.ModuleList([block(in_planes, planes, experts, stride), *rest])


class MoEResNet18(MoENet):
    """ResNet-18 of experts (Zhang et al. 2023, arXiv 2308.10110), with the 3 x 3 stem of :class:`ResNet18` in full width.

    5,834,652 parameters for 10 classes, of which an image uses 3,079,068. The router is a CIFAR ResNet-20 with one output
    for each expert, which starts from He et al.'s initialisation; the authors leave theirs at PyTorch's.

    Args:
        num_classes: the number K of classes.
        experts: see :class:`MoENet`, and so all others.
    """

    def __init__(
        self,
        num_classes: int = 10,
        experts: int = 2,
        ratio: float = 0.5,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(ResNet20(experts, in_channels), experts, ratio, in_channels, mean, std)
        widths = [narrowed(planes, ratio) for planes in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(MoEBlock, 64, widths[0], 2, experts, stride=1)
        self.layer2 = _stage(MoEBlock, widths[0], widths[1], 2, experts, stride=2)
        self.layer3 = _stage(MoEBlock, widths[1], widths[2], 2, experts, stride=2)
        self.layer4 = _stage(MoEBlock, widths[2], widths[3], 2, experts, stride=2)
        self.linear = nn.Linear(widths[3], num_classes)

    def path(self, z: Tensor, route: Route) -> Tensor:
        z = F.relu(self.bn1(self.conv1(z)))
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            z = block(z, route)
        return z.mean((2, 3))


class MoEWideResNet(MoENet):
    """Wide ResNet of experts (Zhang et al. 2023, arXiv 2308.10110) on the layers of :class:`WideResNet`.

    As in our other networks the stem is in full width, shortcuts are of all experts and read the activated input; in the
    authors' wide ResNet the stem is narrowed, too, and shortcuts are of experts and read the raw input.

    Args:
        num_classes: the number K of classes.
        depth: 6 n + 4 for n blocks a stage.
        widen_factor: the stages of the dense network have 16, 32 and 64 times this many channels.
        experts: see :class:`MoENet`, and so all others.

    Raises:
        ValueError: if ``depth`` is not 6 n + 4.
    """

    head_name = "fc"

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 28,
        widen_factor: int = 10,
        experts: int = 2,
        ratio: float = 0.5,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        blocks = blocks_of(depth)
        super().__init__(ResNet20(experts, in_channels), experts, ratio, in_channels, mean, std)
        widths = [narrowed(planes * widen_factor, ratio) for planes in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(MoEWideBlock, 16, widths[0], blocks, experts, stride=1)
        self.block2 = _stage(MoEWideBlock, widths[0], widths[1], blocks, experts, stride=2)
        self.block3 = _stage(MoEWideBlock, widths[1], widths[2], blocks, experts, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("router."):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def path(self, z: Tensor, route: Route) -> Tensor:
        z = self.conv1(z)
        for block in (*self.block1, *self.block2, *self.block3):
            z = block(z, route)
        return F.relu(self.bn1(z)).mean((2, 3))


class MoESmallCNN(MoENet):
    """:class:`SmallCNN` of experts, for small images; its first convolution is the stem, and its router a SmallCNN as well.

    Args:
        num_classes: the number K of classes.
        width: channels of the stem; at ratio 1 the three convolutions of experts have once, twice and twice as many.
        router_width: channels of the router's first two convolutions.
        experts: see :class:`MoENet`, and so all others.
    """

    def __init__(
        self,
        num_classes: int = 10,
        experts: int = 2,
        ratio: float = 0.5,
        in_channels: int = 1,
        width: int = 32,
        router_width: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(SmallCNN(experts, in_channels, router_width), experts, ratio, in_channels, mean, std)
        narrow, wide = narrowed(width, ratio), narrowed(2 * width, ratio)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.convs = nn.ModuleList(
            [MoEConv(width, narrow, experts), MoEConv(narrow, wide, experts, stride=2), MoEConv(wide, wide, experts)]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(planes) for planes in (narrow, wide, wide))
        self.linear = nn.Linear(wide, num_classes)

    def path(self, z: Tensor, route: Route) -> Tensor:
        z = self.stem(z)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            z = F.relu(norm(conv(z, route)))
        return z.mean((2, 3))
