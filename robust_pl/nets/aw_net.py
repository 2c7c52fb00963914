"""AW-Net: a network whose filters and BatchNorms follow what a router says of each image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .dual_norm import Routing, Weight, dual_batch_norm
from .routed import RoutedNet


class Gates:
    """Gates of the batch that goes through a network; all of its gated convolutions share this object.

    Outside of :meth:`use` every gate is 1.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None

    @contextmanager
    def use(self, values: Tensor) -> Iterator[None]:
        """Scale filters by ``values`` (B, gates) of the whole network."""
        before, self.values = self.values, values
        try:
            yield
        finally:
            self.values = before


class GatedConv(nn.Module):
    """A convolution whose filter c is multiplied by gate g[i, c] for image i.

    Filters g[i, c] * W[c] give channel c of conv(z, W) times g[i, c], so that is what is computed: one convolution for all
    images. A bias is no filter and is not scaled.

    Args:
        conv: the convolution.
        gates: shared with the other ones of the network.
        first: column of its first gate.
    """

    def __init__(self, conv: nn.Conv2d, gates: Gates, first: int) -> None:
        super().__init__()
        self.conv, self.gates = conv, gates
        self.columns = slice(first, first + conv.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        out = self.conv(z)
        if self.gates.values is None:
            return out
        gate = self.gates.values[:, self.columns, None, None].to(out.dtype)
        if self.conv.bias is None:
            return out * gate
        # Not (out - bias) * gate + bias: at gates of 1 this is the convolution, bit for bit.
        return out * gate + self.conv.bias.view(1, -1, 1, 1).to(out.dtype) * (1 - gate)


def gate_convolutions(net: nn.Module) -> tuple[Gates, list[int]]:
    """Put gates on every 3 x 3 convolution of a network but its stem, the convolution that it registers first; in place.

    In residual networks these are the 3 x 3 convolutions of the blocks; 1 x 1 shortcuts have no gates.

    Returns:
        What all of them share, and the number of gates of each.

    Raises:
        ValueError: if there is no such convolution, or they have gates already.
    """
    if any(isinstance(module, GatedConv) for module in net.modules()):
        raise ValueError(f"{type(net).__name__} has gated convolutions already: convert a network once")
    convolutions = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    found = [name for name, conv in convolutions[1:] if conv.kernel_size == (3, 3)]
    if not found:
        raise ValueError(f"{type(net).__name__} has no 3 x 3 convolution behind its first one for gates: choose another net")
    gates, sizes = Gates(), []
    for name in found:
        conv = net.get_submodule(name)
        net.set_submodule(name, GatedConv(conv, gates, sum(sizes)))
        sizes.append(conv.out_channels)
    return gates, sizes


class Router(nn.Module):
    """A small network that says of each image how to scale filters, and how likely it is adversarial.

    Three convolutions and a mean over pixels give z (B, D); head l gives gates 2 * sigmoid(z U_l + b_l) in (0, 2), and one more
    the probability. U_l and b_l start at 0, so that at first every gate is 1 and every probability 1/2. BatchNorms are plain
    ones: in train mode give it clean and attacked images as one batch, else it learns to tell batches.

    Args:
        sizes: number of gates of each head.
        in_channels: the number C of image channels.
        width: channels of the first convolution, twice as many of the second.
        dim: D, channels of the third.
    """

    def __init__(self, sizes: list[int], in_channels: int = 3, width: int = 16, dim: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv(in_channels, width),
            *_conv(width, 2 * width, stride=2),
            *_conv(2 * width, dim, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in sizes)
        self.adversarial = nn.Linear(dim, 1)
        for linear in (*self.heads, self.adversarial):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) to all gates and the probability, (B, gates + 1), in float32 at least."""
        z = self.layers(x)
        raw = torch.cat([linear(z) for linear in (*self.heads, self.adversarial)], 1)
        said = raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()
        return torch.cat([2 * said[:, :-1], said[:, -1:]], 1)


class AWNet(RoutedNet):
    """AW-Net (Wei, Zhao, Li 2023, arXiv 2306.03430): any network, with filters and BatchNorms that are weighed for each image.

    A router sees the image and gives gates in (0, 2) for the filters of every 3 x 3 convolution but the stem, and the
    probability p that the image is adversarial, by which dual BatchNorms (the paper's MixBN) are mixed:
    ``p * adversarial + (1 - p) * clean``. An attack on the network goes through all of it.

    A reconstruction: of the paper we had the abstract and summaries, which name the multi-head router, weights that vary filter
    by filter for each sample, MixBN and the training with two teachers (:class:`robust_pl.methods.AWMTARD`). The equations, the
    router's form and all defaults are ours. Left out is another reading of the paper, in which the router picks among parallel
    branches of a block.

    ``{class_path: AWNet, init_args: {net: {class_path: ResNet18}}}``. At first gates are 1, and with ``share=0`` it is the
    given network bit for bit. Without ``share`` both BatchNorms of each pair run, also in train mode, where both then move.

    Args:
        net: has BatchNorms and 3 x 3 convolutions, which are replaced in place and keep their weights: to start from a trained
            network give ``{class_path: TrainedNet, init_args: {source: RUN}}``. In a config it needs ``num_classes`` and
            ``in_channels`` of its own where they are not its defaults.
        in_channels: the number C of image channels.
        width: see :class:`Router`.
        dim: see :class:`Router`.

    Raises:
        ValueError: if the network has no BatchNorm, or no 3 x 3 convolution but its first.
    """

    def __init__(self, net: nn.Module, in_channels: int = 3, width: int = 16, dim: int = 64) -> None:
        super().__init__()
        self.gates, sizes = gate_convolutions(net)
        self.routing: Routing = dual_batch_norm(net)
        self.net = net
        self.router = Router(sizes, in_channels, width, dim)

    def signals(self, x: Tensor) -> Tensor:
        """All gates and, as the last column, p: (B, gates + 1)."""
        return self.router(x)

    @staticmethod
    def share(signals: Tensor) -> Tensor:
        """p, the share of the adversarial BatchNorms, (B,)."""
        return signals[:, -1]

    def routed(self, x: Tensor, signals: Tensor, share: Weight | None = None) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W).

        Args:
            x: pixels.
            signals: gates and p, (B, gates + 1).
            share: None mixes BatchNorms by p (soft); 0.0 or 1.0 takes the clean or the adversarial ones alone (hard), as in
                training, where it is known which images are attacked, and the other ones' statistics stay as they are.
        """
        with self._set(signals, share):
            return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before the last linear layer (B, D), where the network gives them."""
        with self._set(self.signals(x), None):
            return self.net.forward_features(x)

    @contextmanager
    def _set(self, signals: Tensor, share: Weight | None) -> Iterator[None]:
        with self.gates.use(signals[:, :-1]), self.routing.use(self.share(signals) if share is None else share):
            yield


def _conv(in_planes: int, planes: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False), nn.BatchNorm2d(planes), nn.ReLU()
