"""Networks whose passes are recorded once as CUDA graphs and replayed: a GPU then does not wait for the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .folding import Folded

_AT_MOST = 2


class Graphed:
    """:class:`Folded` for attacks: its forward pass and the backward pass to the pixels are launched as one CUDA graph each.

    A ResNet-18 launches some 200 kernels in a forward and backward pass. With few images a GPU waits for them; replayed, it
    does not. And since it is recorded once only, the bias of what is folded may come late (:mod:`robust_pl.nets.epilogue`).
    Recorded is once for each network, shape of batch and autocast dtype, two of them at most at a time; other batches, and
    passes without a gradient, run as they are. If parameters or buffers lie elsewhere in memory than when they were recorded,
    it is recorded anew. The memory that the passes need is kept. Only for networks in eval mode.

    Args:
        folded: the network.
    """

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self._modules = list(folded.model.modules())
        self._fresh: set[tuple[Any, ...]] = set()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        if not (x.is_cuda and x.requires_grad and torch.is_grad_enabled()):
            return self.folded(x)
        model = self.folded.model
        recorded = _RECORDED.setdefault(model, {})
        key = (tuple(x.shape), x.dtype, _autocast(), self.folded.fold, self.folded.channels_last)
        if key not in self._fresh:
            places = _places(model)
            if key not in recorded or recorded[key][2] != places:
                recorded.pop(key, None)
                while len(recorded) >= _AT_MOST:
                    recorded.pop(next(iter(recorded)))
                recorded[key] = (*self._record(x), places)
            else:
                recorded[key][1].refresh()
            self._fresh.add(key)
        logits = recorded[key][0](_Apart.apply(x)).clone()
        _count(self._modules, x, logits)
        return logits

    def _record(self, x: Tensor) -> tuple[Any, Folded]:
        # Of its own, since the weights that it folds must stay where they are.
        folded = Folded(self.folded.model, fold=self.folded.fold, channels_last=self.folded.channels_last, late_bias=True)
        sample = x.detach().clone().requires_grad_()
        with _uncounted(folded.model), _own_cache():
            with torch.no_grad():
                folded(sample)  # looks at the network, and folds, outside of the graph
            return torch.cuda.make_graphed_callables(folded, (sample,)), folded


_RECORDED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[Any, Folded, tuple[int, ...]]]] = WeakKeyDictionary()


class GraphedTraining:
    """The training passes of a network, launched as CUDA graphs: stands where torch keeps what a network is compiled to.

    Replayed is what trains, for batches of the shape of the first: a forward pass, and the backward pass to the weights. Where
    a step makes two forward passes before the first backward pass, as that of TRADES, there is a recording for each, and
    memory for both. As they are run: more passes than that, passes in eval mode, without gradients or with one to the pixels,
    and all while somebody's hooks hang on the network, except those that only count. A replayed pass cannot be differentiated
    twice. Recording runs three passes aside, and puts BatchNorm's statistics back.

    Args:
        net: maps pixels (B, C, H, W) to logits (B, K).
        channels_last: show it images in channels-last memory format.
    """

    replays = True

    def __init__(self, net: nn.Module, channels_last: bool) -> None:
        self.net = net
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._slots: list[_Slot] = []
        self._key: tuple[Any, ...] | None = None
        self._recording = False

    def __call__(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else None
        if x is None or not self._replays(x):
            return self.net._call_impl(*inputs)
        weights = tuple(self.net.parameters())
        key = (tuple(x.shape), x.dtype, _autocast(), tuple(w.requires_grad for w in weights), _places(self.net))
        moved = self._key is None or key[-1] != self._key[-1]
        if moved:
            self._slots, self._key = [], key
        elif key != self._key:  # another shape or precision
            return self.net._call_impl(x)
        slot = next((slot for slot in self._slots if not slot.waits), None)
        if slot is None:
            if len(self._slots) == _AT_MOST:
                return self.net._call_impl(x)
            slot = _Slot(self._record(x))
            self._slots.append(slot)
        logits = slot.run(x.contiguous(memory_format=self.memory_format), *weights)
        _count(list(self.net.modules()), x, logits)
        return logits

    def next_step(self) -> None:
        """What was replayed in the last step and never differentiated is not waited for."""
        for slot in self._slots:
            slot.waits = False

    def _replays(self, x: Any) -> bool:
        usual = isinstance(x, Tensor) and x.is_cuda and x.dim() == 4 and not x.requires_grad
        if self._recording or not (usual and self.net.training and torch.is_grad_enabled()):
            return False
        return all(_only_counts(hook) for module in self.net.modules() for hook in _hooks(module))

    def _record(self, x: Tensor) -> Callable[..., Tensor]:
        names = [name for name, _ in self.net.named_parameters()]

        def run(x: Tensor, *weights: Tensor) -> Tensor:
            return functional_call(self.net, dict(zip(names, weights, strict=True)), (x,))

        sample = x.detach().clone(memory_format=self.memory_format)
        # In the same place, but not the parameters themselves, whose gradients would be tied to the stream of the recording.
        weights = [w.detach().requires_grad_(w.requires_grad) for w in self.net.parameters()]
        kept = [buffer.clone() for buffer in self.net.buffers()]
        self._recording = True
        try:
            with _uncounted(self.net), _own_cache():
                return torch.cuda.make_graphed_callables(run, (sample, *weights), allow_unused_input=True)
        finally:
            self._recording = False
            for buffer, before in zip(self.net.buffers(), kept, strict=True):
                buffer.data.copy_(before)  # unseen by autograd: a pass before this one may hold it


class _Slot:
    """A recorded pass, which may run again when its backward pass has."""

    def __init__(self, graph: Callable[..., Tensor]) -> None:
        self.graph, self.runs, self.waits = graph, 0, False

    def run(self, *given: Tensor) -> Tensor:
        logits = self.graph(*given).clone()
        self.runs, self.waits = self.runs + 1, True
        this = self.runs

        def arrived(_: Tensor) -> None:
            if this != self.runs:
                raise RuntimeError(
                    "a training pass was replayed before the one in its place was differentiated for the last time: set "
                    "cuda_graphs of Speed to false for this method"
                )
            self.waits = False

        logits.register_hook(arrived)
        return logits


class _Apart(torch.autograd.Function):
    """The identity, whose gradient is a tensor of its own: the graph writes into its own one again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


def _places(model: nn.Module) -> tuple[int, ...]:
    return tuple(t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _own_cache() -> torch.autocast:
    """The autocast of the moment, without its cache: what is in it would belong to the graph."""
    dtype = _autocast()
    return torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)


def _hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *module._backward_hooks.values()]


def _only_counts(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "counts_only", False)


def _count(modules: list[nn.Module], x: Tensor, logits: Tensor) -> None:
    """Tell those who count passes of one: a replay runs no module."""
    for module in modules:
        for hook in [*module._forward_pre_hooks.values()]:  # which may prepare the counting
            if _only_counts(hook):
                hook(module, (x,))
    for module in modules:
        for hook in module._forward_hooks.values():
            if _only_counts(hook):
                hook(module, (x,), logits)


@contextmanager
def _uncounted(model: nn.Module) -> Iterator[None]:
    """Recording takes several passes; nobody counts them."""
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in model.modules() if _hooks(module)]
    try:
        for module, *both in kept:
            module._forward_pre_hooks, module._forward_hooks = (
                OrderedDict((key, hook) for key, hook in hooks.items() if not _only_counts(hook)) for hooks in both
            )
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
