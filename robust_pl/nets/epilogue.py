"""Bias, shortcut and ReLU behind a convolution in one kernel, for networks that are recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

_RELU = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_MOST = 2**31 - 1


class Shifted:
    """What a convolution returned, and a bias that is yet to be added.

    A ReLU adds it in its own kernel, and a shortcut's sum on the way there as well: instead of up to four passes over the
    activations there is one. To everybody else it is the tensor that it stands for. Gradients flow to what was added up, and
    not to the bias.

    Args:
        parts: of the sum, each (B, C, H, W).
        bias: (C,).
    """

    def __init__(self, parts: tuple[Tensor, ...], bias: Tensor) -> None:
        self.parts, self.bias = parts, bias

    def whole(self) -> Tensor:
        """The sum (B, C, H, W)."""
        return reduce(add, self.parts) + self.bias.view(-1, 1, 1)

    def relu(self, inplace: bool = False) -> Tensor:
        """The positive part of the sum."""
        kernel = _kernel()
        if kernel is None or len(self.parts) > 2 or not all(map(self._fits, self.parts)):
            return self.whole().relu()
        return _BiasReLU.apply(kernel, self.bias, *self.parts)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Shifted):
            return Shifted((*self.parts, *other.parts), self.bias + other.bias)
        if isinstance(other, Tensor) and other.shape == self.parts[0].shape:
            return Shifted((*self.parts, other), self.bias)
        return self.whole() + other

    __radd__ = __iadd__ = __add__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _RELU and isinstance(args[0], Shifted):
            return args[0].relu()
        if function in _ADD and len(args) == 2 and not kwargs:
            return args[0] + args[1] if isinstance(args[0], Shifted) else args[1] + args[0]
        args, kwargs = tree_map(lambda one: one.whole() if isinstance(one, Shifted) else one, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _fits(self, part: Tensor) -> bool:
        same = part.shape == self.parts[0].shape and part.dtype == self.parts[0].dtype
        return same and part.is_cuda and part.is_contiguous(memory_format=torch.channels_last) and part.numel() <= _MOST


class _BiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., None], bias: Tensor, *parts: Tensor) -> Tensor:
        ctx.count = len(parts)
        out = torch.empty_like(parts[0])
        kernel(parts, bias, out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        passed = torch.ops.aten.threshold_backward(gradient, *ctx.saved_tensors, 0)
        return None, None, *[passed] * ctx.count


@cache
def _kernel() -> Callable[..., None] | None:
    """None where there is no Triton, as there is none without CUDA: then torch adds and cuts in kernels of its own."""
    try:
        from .epilogue_kernel import bias_relu
    except ImportError:
        return None
    return bias_relu
