"""A network with dual BatchNorms that decides for each image how to mix them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .dual_norm import Routing, Weight, dual_batch_norm


class WeightPredictor(nn.Module):
    """Share of the adversarial BatchNorm for each image: three convolutions, a mean over pixels, two linear layers, a sigmoid.

    It starts at 1/2 for every image. Its own BatchNorms are plain ones.

    Args:
        in_channels: the number C of image channels.
        width: channels of the first convolution; the others have twice as many.
    """

    def __init__(self, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv(in_channels, width),
            *_conv(width, 2 * width, stride=2),
            *_conv(2 * width, 2 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 64),
            nn.ReLU(),
        )
        self.linear = nn.Linear(64, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) to weights in (0, 1), (B,)."""
        raw = self.linear(self.layers(x)).squeeze(1)
        return raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()


class AdaptiveDualNet(nn.Module):
    """Any network with dual BatchNorms whose mixing weight is predicted from the image (AFA, arXiv 2105.15157).

    ``{class_path: AdaptiveDualNet, init_args: {net: {class_path: ResNet18}}}``. Its forward predicts the weight, so that an
    attack on it goes through the predictor, too. The form of the predictor is ours: the paper's text was not at hand.

    Args:
        net: has BatchNorms, each of which is replaced in place by a dual one that starts with its weights twice. In a config
            it needs ``num_classes`` and ``in_channels`` of its own where they are not its defaults.
        in_channels: the number C of image channels.
        width: see :class:`WeightPredictor`.

    Raises:
        ValueError: if the network has no BatchNorm.
    """

    def __init__(self, net: nn.Module, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.routing: Routing = dual_batch_norm(net)
        self.net = net
        self.predictor = WeightPredictor(in_channels, width)
        self._pinned: Weight | None = None

    @contextmanager
    def pinned(self, weight: Weight) -> Iterator[None]:
        """Take this weight instead of the predicted one: 0.0 for the clean half alone, 1.0 for the adversarial one."""
        before, self._pinned = self._pinned, weight
        try:
            yield
        finally:
            self._pinned = before

    def weight(self, x: Tensor) -> Weight:
        """Weights of the adversarial half for pixels (B, C, H, W): predicted, (B,), or as pinned."""
        return self.predictor(x) if self._pinned is None else self._pinned

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        with self.routing.use(self.weight(x)):
            return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before the last linear layer (B, D), where the network gives them."""
        with self.routing.use(self.weight(x)):
            return self.net.forward_features(x)


def _conv(in_planes: int, planes: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False), nn.BatchNorm2d(planes), nn.ReLU()
