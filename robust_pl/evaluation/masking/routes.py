"""What the checks of dynamic networks do with the gates inside a model: read them, and hold them still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...callbacks.gates import eagerly
from ...nets.routed import RoutedNet


class Routes:
    """A model, and the dynamic networks that it calls.

    Args:
        model: maps pixels (B, C, H, W) to logits (B, K).
        nets: see :func:`robust_pl.callbacks.gates.called_routed_nets`.
    """

    def __init__(self, model: nn.Module, nets: Sequence[RoutedNet]) -> None:
        self.model, self.nets = model, list(nets)

    def said(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K) and the signals (B, S) of each call of a dynamic network on the way: one forward pass."""
        seen: list[Tensor] = []

        def listen(net: RoutedNet, z: Tensor) -> Tensor:
            signals = net.signals(z)
            if signals.dim() != 2 or len(signals) != len(z):
                raise ValueError(f"signals(x) has shape {tuple(signals.shape)} for {len(z)} images, and not one row for each")
            seen.append(signals)
            return net.routed(z, signals)

        with self._instead(listen), eagerly(x):
            return self.model(x), seen

    def signals(self, x: Tensor) -> list[Tensor]:
        """The signals of each call, without a graph: one forward pass."""
        with torch.no_grad():
            return self.said(x)[1]

    def held(self, signals: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The model with these signals, those of each call, whatever the images are."""

        def forward(x: Tensor) -> Tensor:
            given = iter(signals)
            with self._instead(lambda net, z: net.routed(z, next(given))), eagerly(x):
                return self.model(x)

        return forward

    @contextmanager
    def _instead(self, forward: Callable[[RoutedNet, Tensor], Tensor]) -> Iterator[None]:
        """Each dynamic network goes forward so. Their own methods are all that is asked, whatever their ``forward`` does."""
        before = [vars(net).get("forward") for net in self.nets]
        try:
            for net in self.nets:
                net.forward = partial(forward, net)  # type: ignore[method-assign]
            yield
        finally:
            for net, own in zip(self.nets, before, strict=True):
                del net.forward
                if own is not None:
                    net.forward = own  # type: ignore[method-assign]
