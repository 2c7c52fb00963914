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

_RELU = (F.relu, torch.relu, Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, Tensor.relu_)
_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_MOST = 2**31 - 1
_OPERATORS = (
    *("sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul", "rmatmul"),
    *("neg", "pos", "abs", "invert", "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne"),
    *("getitem", "setitem", "len", "iter", "bool", "float", "int", "contains"),
)
_IN_PLACE = ("isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")


class Shifted:
    """What a convolution returned, and a bias that is yet to be added.

    A ReLU adds it in its own kernel, and a shortcut's sum on the way there as well: instead of up to four passes over the
    activations there is one. To everybody else it is the tensor that it stands for, which is made once when it is asked for,
    and changes in place as any. Gradients flow to what was added up, and not to the bias.

    Args:
        parts: of the sum, each (B, C, H, W).
        bias: (C,).

    Raises:
        RuntimeError: if a part was changed in place before the sum was asked for.
    """

    def __init__(self, parts: tuple[Tensor, ...], bias: Tensor) -> None:
        self._parts, self._bias = parts, bias
        self._versions = [part._version for part in parts]
        self._gradients = torch.is_grad_enabled()
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """The sum (B, C, H, W)."""
        if self._whole is None:
            with torch.set_grad_enabled(self._gradients):
                self._becomes(reduce(add, self._unchanged()) + self._bias.view(-1, 1, 1))
        return self._whole

    def relu(self, inplace: bool = False) -> Tensor:
        """The positive part of the sum."""
        kernel = _kernel()
        fits = self._whole is None and self._gradients == torch.is_grad_enabled() and len(self._parts) <= 2
        if kernel is None or not fits or not all(map(self._fits, self._parts)):
            return self.whole().relu_() if inplace else self.whole().relu()
        positive = _BiasReLU.apply(kernel, self._bias, *self._unchanged())
        if inplace:
            self._becomes(positive)
        return positive

    def relu_(self) -> Tensor:
        return self.relu(inplace=True)

    def __add__(self, other: Any) -> Any:
        if not self._joins(other):
            return self.whole() + _made(other)
        if type(other) is Shifted:
            return Shifted((*self._unchanged(), *other._unchanged()), self._bias + other._bias)
        return Shifted((*self._unchanged(), other), self._bias)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Shifted:
        if not self._joins(other) or any(part.dtype != self._parts[0].dtype for part in getattr(other, "_parts", (other,))):
            self.whole().add_(_made(other))
            return self
        self.__dict__.update(vars(self + other))
        return self

    def __getattr__(self, name: str) -> Any:
        if "_whole" not in vars(self):  # one that is being copied
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _RELU_IN_PLACE:
            return args[0].relu(inplace=True)
        if function in _RELU and args and type(args[0]) is Shifted:
            return args[0].relu(*args[1:], **kwargs)
        if function in _ADD and len(args) == 2 and not kwargs:
            return args[0] + args[1] if type(args[0]) is Shifted else args[1] + args[0]
        args, kwargs = tree_map(_made, (args, kwargs))
        return function(*args, **kwargs)

    def _joins(self, other: Any) -> bool:
        """Whether the sum with it can wait, too."""
        if self._whole is not None or self._gradients != torch.is_grad_enabled():
            return False
        if type(other) is Shifted:
            return (
                other._whole is None and other._gradients == self._gradients and other._parts[0].shape == self._parts[0].shape
            )
        return isinstance(other, Tensor) and other.shape == self._parts[0].shape

    def _unchanged(self) -> tuple[Tensor, ...]:
        if [part._version for part in self._parts] != self._versions:
            raise RuntimeError("what a sum waits for was changed in place: the network cannot be recorded with late biases")
        return self._parts

    def _becomes(self, tensor: Tensor) -> None:
        self._whole, self._parts = tensor, ()

    def _fits(self, part: Tensor) -> bool:
        same = part.shape == self._parts[0].shape and part.dtype == self._parts[0].dtype
        return same and part.is_cuda and part.is_contiguous(memory_format=torch.channels_last) and part.numel() <= _MOST


def _made(one: Any) -> Any:
    return one.whole() if type(one) is Shifted else one


def _of_whole(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.whole(), name)(*map(_made, args))


def _changes_whole(name: str) -> Callable[..., Any]:
    def change(self: Shifted, other: Any) -> Shifted:
        getattr(self.whole(), name)(_made(other))
        return self

    return change


for _name in _OPERATORS:
    setattr(Shifted, f"__{_name}__", _of_whole(f"__{_name}__"))
for _name in _IN_PLACE:
    setattr(Shifted, f"__{_name}__", _changes_whole(f"__{_name}__"))
Shifted.__hash__ = object.__hash__  # type: ignore[method-assign]


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
