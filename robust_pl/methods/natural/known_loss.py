"""A loss whose gradients by the weights were found beside those by the pixels, in one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KnownLoss:
    """To be used once, and only while the weights are those that it was found with.

    Args:
        value: the loss, a scalar.
        parameters: that it was differentiated by.
        gradients: of each, None where it has no part in the loss.
    """

    def __init__(self, value: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        self._value: Tensor | None = value.detach()
        self._parameters, self._gradients = list(parameters), list(gradients)
        self._versions = [parameter._version for parameter in parameters]

    def take(self) -> Tensor | None:
        """The loss, which brings its gradients into any backward pass; it is then gone. None if it is, or a weight moved."""
        value, parameters, gradients = self._value, self._parameters, self._gradients
        self._value, self._parameters, self._gradients = None, [], []
        if value is None or self._versions != [parameter._version for parameter in parameters]:
            return None
        return _Known.apply(value, gradients, *parameters)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else upstream.to(g.dtype) * g for g in ctx.gradients)
