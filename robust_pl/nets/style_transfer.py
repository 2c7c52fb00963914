"""Style transfer by AdaIN, from weights that the user has."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..functional.moments import channel_moments, match_moments
from .reference import find_file
from .weights import fill, read_tensors

_STEP = 8


class StyleTransfer(nn.Module):
    """Style transfer in the features of a VGG-19 (Huang and Belongie 2017, arXiv 1703.06868); it is never trained here.

    An image goes through VGG-19 to ``relu4_1``, its channels get the mean and the standard deviation of a style there, and the
    decoder makes an image of it again. Both networks take pixels in [0, 1]; the file of the encoder is the "normalised" VGG,
    whose first 1 x 1 convolution takes the place of a normalisation. The public ports' files fit: ``vgg_normalised.pth``, of
    which the layers behind ``relu4_1`` are left out, and ``decoder.pth``. Without these files there is no style transfer:
    :class:`robust_pl.data.PixelAdaIN` is something else.

    Args:
        encoder: file of VGG-19's weights, as it is or under ``ROBUST_PL_DATA``.
        decoder: file of the decoder's weights, likewise.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is damaged, or of another network.
    """

    def __init__(self, encoder: str, decoder: str) -> None:
        super().__init__()
        self.encoder, self.decoder = vgg_encoder(), adain_decoder()
        for net, path in ((self.encoder, find_file(encoder)), (self.decoder, find_file(decoder))):
            fill(net, _first_layers(path, len(net)), str(path))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def moments(self, styles: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels of ``relu4_1``, pixels (B, 3, H, W) -> (B, 512, 1, 1) twice."""
        return channel_moments(self.features(styles))

    def features(self, x: Tensor) -> Tensor:
        """Channels of ``relu4_1``, pixels (B, 3, H, W) -> (B, 512, H / 8, W / 8).

        Raises:
            ValueError: if a side has 8 pixels or less, of which one place is left.
        """
        if min(x.shape[2:]) <= _STEP:
            raise ValueError(f"images of {tuple(x.shape[2:])} pixels have no statistics in VGG-19: take 64 or more")
        return self.encoder(x)

    @torch.no_grad()
    def forward(self, content: Tensor, mean: Tensor, std: Tensor, alpha: float = 1.0) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] in another style.

        Args:
            content: pixels (B, 3, H, W) in [0, 1].
            mean: of the style, what :meth:`moments` returned, (B, 512, 1, 1).
            std: likewise.
            alpha: share of the style, in [0, 1].
        """
        height, width = content.shape[2:]
        # Sides that 8 does not divide come back longer.
        out = self.decoder(match_moments(self.features(content), mean, std, alpha))
        return out[:, :, :height, :width].clamp(0, 1)


def vgg_encoder() -> nn.Sequential:
    """VGG-19 up to ``relu4_1`` with reflecting padding, (B, 3, H, W) -> (B, 512, H / 8, W / 8), in the layout of its files."""
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 1)]
    for stage in ([(3, 64), (64, 64)], [(64, 128), (128, 128)], [(128, 256), *[(256, 256)] * 3]):
        layers += [layer for planes in stage for layer in _convolution(*planes)]
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, *_convolution(256, 512))


def adain_decoder() -> nn.Sequential:
    """The encoder's mirror image, (B, 512, H, W) -> (B, 3, 8 H, 8 W), in the layout of its files."""
    layers: list[nn.Module] = _convolution(512, 256)
    for stage in ([*[(256, 256)] * 3, (256, 128)], [(128, 128), (128, 64)], [(64, 64), (64, 3)]):
        layers.append(nn.Upsample(scale_factor=2))
        layers += [layer for planes in stage for layer in _convolution(*planes)]
    return nn.Sequential(*layers[:-1])


def _convolution(in_planes: int, planes: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(1), nn.Conv2d(in_planes, planes, 3), nn.ReLU()]


def _first_layers(path: Path, count: int) -> dict[str, Tensor]:
    """The tensors of a Sequential's first layers; a VGG's file goes on behind them."""
    tensors = read_tensors(path)
    numbers = {name: re.search(r"(\d+)\.(?:weight|bias)$", name) for name in tensors}
    return {name: t for name, t in tensors.items() if numbers[name] is None or int(numbers[name][1]) < count}
