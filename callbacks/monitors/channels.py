"""Which channels of a network recognise a perturbation rather than the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...functional.channels import bimodality, channel_norms, channel_ratio
from ..attacks.prepare import evaluating


@dataclass(frozen=True)
class Channels:
    """A convolution under attack.

    Args:
        ratio: activity of each channel on attacked over clean images (C,), see :func:`channel_ratio`.
        norms: l2 norm of the weights of each channel (C,).
        bimodality: Sarle's coefficient of the norms; above 5/9 there may be two kinds of channels.
        accuracy: on the attacked images.
        accuracy_without: the same with the channels of the highest ratios set to zero.
    """

    ratio: Tensor
    norms: Tensor
    bimodality: float
    accuracy: float
    accuracy_without: float

    @property
    def dominant(self) -> int:
        """Channels at least twice as active under attack."""
        return int((self.ratio > 2).sum())

    @property
    def suppressed(self) -> int:
        """Channels at most half as active under attack."""
        return int((self.ratio < 0.5).sum())


def channel_differentiation(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, top: int = 4) -> dict[str, Channels]:
    """Channel differentiation (He et al. 2023, arXiv 2302.11963) of every 2-D convolution that ``net`` runs.

    The paper has the idea; ratio, bounds and the accuracy without channels are ours. In eval mode and without gradients; costs
    two forward passes, and one more for each convolution.

    Args:
        net: maps pixels to logits (B, K).
        x: clean pixels (B, C, H, W).
        x_adv: the same attacked, by FGSM for the paper's question.
        y: labels int64 (B,).
        top: how many channels are set to zero; all but one at most.

    Raises:
        ValueError: if top is below 1.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    with evaluating(net), torch.no_grad():

        def accuracy(pixels: Tensor) -> float:
            return (net(pixels).argmax(1) == y).double().mean().item()

        with _recorded(layers) as clean:
            net(x)
        with _recorded(layers) as attacked:
            reached = accuracy(x_adv)
        found = {}
        for name, activation in clean.items():
            ratio, norms = channel_ratio(attacked[name], activation), channel_norms(layers[name].weight)
            highest = ratio.topk(min(top, len(ratio) - 1)).indices
            with _silenced(layers[name], highest):
                without = accuracy(x_adv)
            found[name] = Channels(ratio, norms, bimodality(norms).item(), reached, without)
    return found


@contextmanager
def _recorded(layers: dict[str, nn.Conv2d]) -> Iterator[dict[str, Tensor]]:
    """Name -> what the layer returned last."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found.update({name: output})

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _silenced(layer: nn.Conv2d, channels: Tensor) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, inputs, output: output.index_fill(1, channels, 0.0))
    try:
        yield
    finally:
        handle.remove()
