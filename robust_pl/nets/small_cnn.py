"""A small convolutional network for small images, such as scikit-learn's 8 x 8 digits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier


class SmallCNN(ImageClassifier):
    """Four 3 x 3 convolutions with BatchNorm and global average pooling; 65,834 parameters at the defaults.

    The third convolution halves the resolution and doubles the width, so any image of 2 x 2 pixels or more fits.

    Args:
        num_classes: the number K of classes.
        in_channels: the number C of image channels.
        width: channels of the first two convolutions; the last two have twice as many.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        width: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(in_channels, mean, std)
        self.layers = nn.Sequential(
            *_conv(in_channels, width),
            *_conv(width, width),
            *_conv(width, 2 * width, stride=2),
            *_conv(2 * width, 2 * width),
        )
        self.linear = nn.Linear(2 * width, num_classes)

    def features(self, z: Tensor) -> Tensor:
        return self.layers(z).mean((2, 3))


def _conv(in_planes: int, planes: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(planes), nn.ReLU()
