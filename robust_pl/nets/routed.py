"""Dynamic networks: what they compute for an image depends on the image."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class RoutedNet(nn.Module, ABC):
    """A network in two parts: a router that looks at an image, and a network whose gates follow the router's signals.

    An attack goes through both. That they can be called one by one lets a method train them apart, and lets an evaluation look
    for gates that hide gradients: it attacks the router alone, or with gates that stay as they are.
    """

    @abstractmethod
    def signals(self, x: Tensor) -> Tensor:
        """All that the router says of each image, (B, S), differentiable with respect to pixels (B, C, H, W)."""

    @abstractmethod
    def routed(self, x: Tensor, signals: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) with the gates that ``signals`` (B, S) say, differentiable in both."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        return self.routed(x, self.signals(x))
