"""Networks whose passes are recorded once as CUDA graphs and replayed: a GPU then does not wait for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .folded_layers import FoldedLayers
from .folding import Folded
from .looking import alike, logits_and_gradient
from .recording import autocast_dtype, count, only_counted, own_cache, places, state, uncounted

_AT_MOST = 2
_WAYS = 8


class Graphed:
    """:class:`Folded` for attacks: its forward pass and the backward pass to the pixels are launched as one CUDA graph each.

    A ResNet-18 launches some 200 kernels in a forward and backward pass. With few images a GPU waits for them; replayed, it
    does not. And since it is recorded once only, the bias of what is folded may come late (:mod:`robust_pl.nets.epilogue`).
    Recorded is once for each network, shape of batch, autocast dtype and state of its modules, two of them at most at a time; a
    recording that does not give what the network gives is not used. Run as they are: other batches, passes without a gradient,
    networks with hooks that do more than count, and those that are in another state in every call, such as one that counts its
    passes. If parameters or buffers lie elsewhere in memory than when they were recorded, it is recorded anew. A pass that is
    differentiated more than once is replayed before each further time, and only the latest pass can be differentiated. The
    memory that the passes need is kept. Only for networks in eval mode.

    Args:
        folded: the network.
    """

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self._modules = list(folded.model.modules())
        self._state: tuple[Any, ...] | None = None
        self._fresh: set[tuple[Any, ...]] = set()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        if not (_on_cuda(x) and x.requires_grad and torch.is_grad_enabled() and only_counted(self._modules)):
            return self.folded(x)
        model = self.folded.model
        if self._state is None:
            self._state = state(self._modules)
        known = _RECORDED.setdefault(model, _Recordings())
        key = (tuple(x.shape), x.dtype, autocast_dtype(), self.folded.fold, self.folded.channels_last, self._state)
        if not known.may_replay(self._state):
            return self.folded(x)
        if key not in self._fresh:
            known.prepare(key, places(model), lambda: self._record(x))
            self._fresh.add(key)
        recording = known.of[key][0] if key in known.of else None
        if recording is None:
            return self.folded(x)
        logits = recording.run(x)
        count(self._modules, x, logits)
        return logits

    def _record(self, x: Tensor) -> _Recording | None:
        model, sample = self.folded.model, x.detach().clone().requires_grad_()
        with uncounted(model), own_cache(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            expected = logits_and_gradient(model, sample)
            for late_bias in (True, False) if self.folded.fold else (False,):
                # Of its own, since the weights that it folds must stay where they are.
                folded = Folded(model, fold=self.folded.fold, channels_last=self.folded.channels_last, late_bias=late_bias)
                with torch.no_grad():
                    folded(sample)  # looks at the network, and folds, outside of the graph
                recording = _Recording(torch.cuda.make_graphed_callables(folded, (sample,)), folded.layers)
                if alike(logits_and_gradient(recording.run, sample), expected):
                    return recording
        return None


class _Recording:
    """A recorded pass: not the network itself, which would never be forgotten.

    Args:
        graph: maps pixels to logits.
        layers: whose weights are folded; None if none are.
    """

    def __init__(self, graph: Callable[[Tensor], Tensor], layers: FoldedLayers | None) -> None:
        self.graph, self.layers, self.runs = graph, layers, 0

    def refresh(self) -> None:
        if self.layers is not None:
            self.layers.refresh()

    def run(self, x: Tensor) -> Tensor:
        logits = self.graph(_Apart.apply(x)[0]).clone()
        self.runs += 1
        this, spent = self.runs, False

        def arrived(_: Tensor) -> None:
            nonlocal spent
            if this != self.runs:
                raise RuntimeError(
                    "a pass was replayed before the one in its place was differentiated for the last time: set cuda_graphs of "
                    "Speed to false for this attack"
                )
            if spent:  # the backward pass has overwritten what the forward pass kept for it
                with torch.no_grad():
                    self.graph(x.detach())
            spent = True

        logits.register_hook(arrived)
        return logits


class _Recordings:
    """Those of one network."""

    def __init__(self) -> None:
        self.of: dict[tuple[Any, ...], tuple[_Recording | None, tuple[int, ...]]] = {}
        self._states: set[tuple[Any, ...]] = set()

    def may_replay(self, state: tuple[Any, ...]) -> bool:
        """Not in states that are always new: to record takes as long as some hundred passes."""
        if len(self._states) < _WAYS:
            self._states.add(state)
        return state in self._states

    def prepare(self, key: tuple[Any, ...], where: tuple[int, ...], record: Callable[[], _Recording | None]) -> None:
        """Record, or fold the weights of the moment."""
        if key in self.of and self.of[key][1] == where:
            if (recording := self.of[key][0]) is not None:
                recording.refresh()
            return
        self.of.pop(key, None)
        while len(self.of) >= _AT_MOST:
            self.of.pop(next(iter(self.of)))
        self.of[key] = record(), where


_RECORDED: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()


class GraphedTraining:
    """The training passes of a network, launched as CUDA graphs: stands where torch keeps what a network is compiled to.

    Replayed is what trains, for batches of the shape of the first: a forward pass, and the backward pass to the weights. Where
    a step makes two forward passes before the first backward pass, as that of TRADES, there is a recording for each, and
    memory for both. As they are run: more passes than that, passes in eval mode, without gradients or with one to the pixels,
    those of a network in another state than when it was recorded (a layer frozen, another rate of dropout, a count of passes),
    and all while somebody's hooks hang on the network, except those that only count. A replayed pass is differentiated once,
    and not twice over. Recording runs three passes aside, and puts BatchNorm's statistics and random streams back.

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

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 and not named else None
        modules = list(self.net.modules())
        if x is None or not self._replays(x, modules):
            return self.net._call_impl(*inputs, **named)
        weights = tuple(self.net.parameters())
        trained = tuple(w.requires_grad for w in weights)
        key = (tuple(x.shape), x.dtype, autocast_dtype(), trained, state(modules), places(self.net))
        if key != self._key:
            # Another batch, precision or state; weights that moved are not that.
            if not any(trained) or (self._key is not None and key[-1] == self._key[-1]):
                return self.net._call_impl(x)
            self._slots, self._key = [], key
        slot = next((slot for slot in self._slots if not slot.waits), None)
        if slot is None:
            if len(self._slots) == _AT_MOST:
                return self.net._call_impl(x)
            slot = _Slot(self._record(x))
            self._slots.append(slot)
        logits = slot.run(x.contiguous(memory_format=self.memory_format), *weights)
        count(modules, x, logits)
        return logits

    def next_step(self) -> None:
        """What was replayed in the last step and never differentiated is not waited for."""
        for slot in self._slots:
            slot.waits = False

    def _replays(self, x: Any, modules: list[nn.Module]) -> bool:
        usual = isinstance(x, Tensor) and _on_cuda(x) and x.dim() == 4 and not x.requires_grad
        if self._recording or not (usual and self.net.training and torch.is_grad_enabled()):
            return False
        return only_counted(modules)

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
            with uncounted(self.net), own_cache(), torch.random.fork_rng([x.device] if x.is_cuda else []):
                return torch.cuda.make_graphed_callables(run, (sample, *weights), allow_unused_input=True)
        finally:
            self._recording = False
            for buffer, before in zip(self.net.buffers(), kept, strict=True):
                buffer.data.copy_(before)  # unseen by autograd: a pass before this one may hold it


class _Slot:
    """A recorded pass, which may run again when its backward pass has."""

    def __init__(self, graph: Callable[..., Tensor]) -> None:
        self.graph, self.runs, self.waits = graph, 0, False

    def run(self, x: Tensor, *weights: Tensor) -> Tensor:
        logits = self.graph(x, *_Apart.apply(*weights)).clone()
        self.runs, self.waits = self.runs + 1, True
        this, spent = self.runs, False

        def arrived(_: Tensor) -> None:
            nonlocal spent
            if this != self.runs or spent:
                raise RuntimeError(
                    "a training pass was replayed before the one in its place was differentiated for the last time: set "
                    "cuda_graphs of Speed to false for this method"
                )
            self.waits, spent = False, True

        logits.register_hook(arrived)
        return logits


class _Apart(torch.autograd.Function):
    """The identity, whose gradients are tensors of their own: the graph writes into its own ones again.

    Those of weights would be summed up there, or kept by somebody, while the next replay writes over them.
    """

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [gradient for gradient in gradients if gradient is not None]
        own = iter(torch._foreach_mul(there, 1) if there else [])
        return tuple(None if gradient is None else next(own) for gradient in gradients)


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda
