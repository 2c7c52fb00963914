"""Convolutions that run with the BatchNorm behind them in their weights, while a network is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident, local
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .epilogue import Shifted

Layers = tuple["ref[nn.Conv2d]", "ref[nn.BatchNorm2d | nn.SyncBatchNorm]", tuple["ref[nn.Module]", ...]]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_ASIDE = local()


class OtherWay(Exception):
    """The network went another way through its layers than when it was looked at."""


class FoldedLayers:
    """Convolutions and BatchNorms of one network that run as one while :meth:`at_work`.

    What a convolution returns meanwhile is no tensor, but something that its BatchNorm alone can read: whoever else does, or
    keeps it, or calls one of the layers twice, makes the pass end in :class:`OtherWay`. So do weights that change on the way.

    Args:
        pairs: convolution, BatchNorm, and the modules that lie on the way, whose hooks would see what goes there.
        channels_last: memory format of the folded weights.
        late_bias: leave the bias to the ReLU that follows, see :class:`robust_pl.nets.epilogue.Shifted`.
    """

    def __init__(self, pairs: list[Any], channels_last: bool = True, late_bias: bool = False) -> None:
        self.pairs, self.channels_last, self.late_bias = pairs, channels_last, late_bias
        self.left = False
        self._weights: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._stamps: list[tuple[Any, ...]] = []
        self._held: list[Any] = []  # so that no tensor that comes later has the id of one that was folded
        self._done: set[int] = set()
        self._waiting: dict[int, tuple[_Made, Tensor]] = {}
        self._given: list[ref[_Made]] = []

    def refresh(self) -> None:
        """Fold the weights as they are now into the tensors that are in use."""
        self._stamps = [_stamp(conv, norm) for conv, norm, _ in self.pairs]
        self._held = [_tensors(conv, norm) for conv, norm, _ in self.pairs]
        for kept in self._weights.values():
            _fold(self.pairs, kept)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Meanwhile the layers run as one, in this thread alone.

        Raises:
            OtherWay: if the network went another way.
        """
        if self._stamps != [_stamp(conv, norm) for conv, norm, _ in self.pairs]:
            self.refresh()
        self.left, thread = False, get_ident()
        self._forget()
        placed = []
        try:
            for i, (conv, norm, on_the_way) in enumerate(self.pairs):
                if norm.training or is_special(conv) or is_special(norm) or any(map(has_hooks, on_the_way)):
                    continue
                for layer, run in ((conv, partial(self._convolve, i, conv)), (norm, partial(self._pass_on, i, norm))):
                    vars(layer)["forward"] = _Instead(layer, run, thread)
                    placed.append(layer)
            yield
            if self.left or self._waiting or any(made() is not None for made in self._given):
                raise OtherWay
        finally:
            for layer in placed:
                vars(layer).pop("forward", None)
            self._forget()

    def _forget(self) -> None:
        self._done.clear()
        self._waiting.clear()
        self._given.clear()

    def _leave(self) -> OtherWay:
        self.left = True  # a network may catch what it does not know
        return OtherWay()

    def _convolve(self, i: int, conv: nn.Conv2d, input: Tensor) -> _Made:
        recomputed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        # To be computed again later, when this convolution is itself; or a second time; or with weights of the moment.
        if recomputed or i in self._done or self._stamps[i] != _stamp(*self.pairs[i][:2]) or conv.weight.grad_fn is not None:
            raise self._leave()
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else conv.weight.dtype
        if dtype not in self._weights:
            self._weights[dtype] = _room(self.pairs, dtype, self.channels_last)
            _fold(self.pairs, self._weights[dtype])
        weight, bias = self._weights[dtype][i]
        made = _Made(conv._conv_forward(input, weight, None if self.late_bias else bias), self)
        self._done.add(i)
        self._waiting[i] = made, bias
        self._given.append(ref(made))
        return made

    def _pass_on(self, i: int, norm: nn.Module, input: Any) -> Tensor | Shifted:
        made, bias = self._waiting.pop(i, (None, None))
        if made is None or input is not made or norm.training:
            raise self._leave()
        z = made._tensor
        made._tensor = None
        return Shifted((z,), bias) if self.late_bias else z


class _Made:
    """What a folded convolution returned, for the BatchNorm that is in it; hooks that count take :func:`counted` of it."""

    __slots__ = ("__weakref__", "_layers", "_tensor")

    def __init__(self, tensor: Tensor, layers: FoldedLayers) -> None:
        self._tensor, self._layers = tensor, layers

    def __getattr__(self, name: str) -> Any:
        raise self._layers._leave()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in torch.utils._pytree.tree_leaves((args, kwargs)):
            if type(given) is _Made:
                given._layers.left = True
        raise OtherWay

    def _refuse(self, *_: Any) -> Any:
        raise self._layers._leave()

    __bool__ = __len__ = __iter__ = __getitem__ = __setitem__ = __eq__ = __ne__ = __float__ = __int__ = __array__ = _refuse
    __hash__ = object.__hash__


def counted(output: Any) -> Any:
    """What a hook that only counts may count of an output: the tensor, also where it is that of a folded convolution."""
    return output._tensor if type(output) is _Made else output


@contextmanager
def aside() -> Iterator[None]:
    """Meanwhile networks run as they are: for what runs one a second time in the middle of a pass, to measure it."""
    _ASIDE.count = getattr(_ASIDE, "count", 0) + 1
    try:
        yield
    finally:
        _ASIDE.count -= 1


class _Instead:
    """In the place of a layer's own forward. Other threads, and copies of the network made meanwhile, get that one."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any], thread: int) -> None:
        self.layer, self.run, self.thread = layer, run, thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != self.thread or getattr(_ASIDE, "count", 0):
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return self.run(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _own_forward, (self.layer,)


def _own_forward(layer: nn.Module) -> Callable[..., Any]:
    return MethodType(type(layer).forward, layer)


def is_special(module: nn.Module) -> bool:
    """Whether a layer does more than its class does."""
    return "forward" in vars(module) or hasattr(module, "parametrizations") or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether others than those who count see what goes through a module."""
    return any(not getattr(hook, "counts_only", False) for hooks in HOOKS for hook in getattr(module, hooks).values())


def _stamp(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> tuple[Any, ...]:
    """Changes when one of the tensors that are folded is replaced, or written to where autograd sees it."""
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in _tensors(conv, norm) if t is not None)


def _tensors(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> tuple[Tensor | None, ...]:
    return (*conv._parameters.values(), *norm._parameters.values(), *norm._buffers.values())


def _room(pairs: list[Any], dtype: torch.dtype, channels_last: bool) -> list[tuple[Tensor, Tensor]]:
    """Where weight and bias of each convolution with its BatchNorm in it are to be."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weights = [torch.empty_like(conv.weight, dtype=dtype, memory_format=memory_format) for conv, *_ in pairs]
    return [(weight, weight.new_empty(len(weight))) for weight in weights]


def _fold(pairs: list[Any], into: list[tuple[Tensor, Tensor]]) -> None:
    """Write weight and bias of each convolution with its BatchNorm in it, in few kernels."""
    convs, norms, _ = zip(*pairs, strict=True)
    with torch.no_grad():
        gain = [torch.ones_like(norm.running_var) if norm.weight is None else norm.weight for norm in norms]
        offset = [torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias for norm in norms]
        shift = [norm.running_mean if conv.bias is None else norm.running_mean - conv.bias for conv, norm, _ in pairs]
        deviation = torch._foreach_sqrt(torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms]))
        scale = torch._foreach_div(gain, deviation)
        torch._foreach_copy_([bias for _, bias in into], torch._foreach_addcmul(offset, shift, scale, value=-1))
        for conv, factor, (weight, _) in zip(convs, scale, into, strict=True):
            torch.mul(conv.weight, factor.view(-1, 1, 1, 1), out=weight)
