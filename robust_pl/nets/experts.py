"""Convolutions of several experts, of which each image takes one, and what networks made of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .routed import RoutedNet


class Route:
    """Who takes which expert: a batch sorted by expert, so that each expert reads one block of it and no other image.

    The gate of an image is the one-hot of its highest score. Backward it is the identity (straight-through): the score of the
    chosen expert gets the sum of gradient times output over all gated layers. The published code gates all experts and then
    gathers the channels that were let through, so the others' outputs reach no loss and their scores get 0 there, too.

    How large the blocks are must be known to the host, which waits for the device once for each forward pass. Without that,
    every image needs filters of its own in a grouped convolution, which is slower: ``python -m benchmarks.moe``.

    Args:
        scores: of the router, (B, N).
    """

    def __init__(self, scores: Tensor) -> None:
        chosen = scores.argmax(1)
        self.order = chosen.argsort(stable=True)
        self.back = self.order.argsort()
        self.sizes: list[int] = (chosen.unsqueeze(1) == torch.arange(scores.shape[1], device=chosen.device)).sum(0).tolist()
        score = scores.gather(1, chosen.unsqueeze(1))[self.order].view(-1, 1, 1, 1)
        # Exactly 1, with the gradient of the score.
        self.gate = 1 + (score - score.detach()) if score.requires_grad else None


class MoEConv(nn.ModuleList):
    """A 3 x 3 convolution with ``experts`` sets of filters, each of which sees its own images alone.

    Where an expert has no image, it convolves an empty batch: its filters then have a gradient of zero, as DDP expects.
    """

    def __init__(self, in_planes: int, planes: int, experts: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False) for _ in range(experts))

    def forward(self, z: Tensor, route: Route) -> Tensor:
        """(B, C, H, W) sorted by expert -> (B, planes, H', W') in the same order."""
        out = torch.cat([conv(block) for conv, block in zip(self, z.split(route.sizes), strict=True)])
        return out if route.gate is None else out * route.gate.to(out.dtype)


class MoENet(RoutedNet, ImageClassifier):
    """A mixture-of-experts CNN (Zhang et al. 2023, arXiv 2308.10110): one router picks the same expert in every layer.

    The signals are the router's scores (B, N). An image costs the router and one path, whatever the number of experts.
    Stem, 1 x 1 shortcuts, BatchNorm and head belong to all experts. Inside, images stand in the order of their experts, which
    matters to hooks on single layers; features and logits are in the order of the batch.

    A network derives from this, builds its layers and defines :meth:`path`.

    Args:
        router: maps normalised images (B, C, H, W) to scores (B, N).
        experts: the number N of experts.
        ratio: width of a path, as a share of the dense network's.
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation; the router sees normalised images, too.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if there are fewer than two experts, or the ratio is not in (0, 1].
    """

    def __init__(
        self,
        router: nn.Module,
        experts: int,
        ratio: float,
        in_channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        if experts < 2:
            raise ValueError(f"experts={experts} leaves a router nothing to choose: set it to at least 2")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} is the width of a path as a share of the dense network's: choose from (0, 1]")
        super().__init__(in_channels, mean, std)
        self.router = router
        self.experts = experts

    @abstractmethod
    def path(self, z: Tensor, route: Route) -> Tensor:
        """Map normalised images (B, C, H, W), sorted by expert, to features (B, D)."""

    def signals(self, x: Tensor) -> Tensor:
        return self.router(self.normalize(self.check_input(x)))

    def routed(self, x: Tensor, signals: Tensor) -> Tensor:
        if signals.shape != (len(x), self.experts):
            raise ValueError(
                f"signals of shape {tuple(signals.shape)} were given for {len(x)} images and {self.experts} experts: pass what "
                "signals(x) returns"
            )
        return self.head(self._along(self.normalize(self.check_input(x)), signals))

    def features(self, z: Tensor) -> Tensor:
        return self._along(z, self.router(z))

    def _along(self, z: Tensor, scores: Tensor) -> Tensor:
        route = Route(scores)
        return self.path(z.index_select(0, route.order), route).index_select(0, route.back)


def narrowed(planes: int, ratio: float) -> int:
    """Channels of a path where the dense network has ``planes``, at least one."""
    return max(1, int(ratio * planes))
