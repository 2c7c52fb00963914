"""A network whose passes are recorded once as CUDA graphs and replayed: for attacks with small batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .folding import Folded

_Recorded = tuple[Any, Folded, tuple[int, ...]]
_RECORDED: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Recorded]] = WeakKeyDictionary()
_AT_MOST = 2


class Graphed:
    """:class:`Folded`, its forward pass and the backward pass to the pixels launched as one CUDA graph each.

    A ResNet-18 launches some 200 kernels in a forward and backward pass. With few images a GPU waits for them; replayed, it
    does not. The logits and gradients are those of :class:`Folded`, since the same kernels run. Recorded is once for each
    network, shape of batch and autocast dtype, two of them at most at a time; other batches, and passes without a gradient,
    run as they are. If parameters or buffers lie elsewhere in memory than when they were recorded, it is recorded anew. The
    memory that the passes need is kept. Only for networks in eval mode.

    Args:
        folded: the network.
    """

    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self._fresh: set[tuple[Any, ...]] = set()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        if not (x.is_cuda and x.requires_grad and torch.is_grad_enabled()):
            return self.folded(x)
        model = self.folded.model
        recorded = _RECORDED.setdefault(model, {})
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (tuple(x.shape), x.dtype, dtype, self.folded.fold, self.folded.channels_last)
        if key not in self._fresh:
            places = tuple(t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors)
            if key not in recorded or recorded[key][2] != places:
                recorded.pop(key, None)
                while len(recorded) >= _AT_MOST:
                    recorded.pop(next(iter(recorded)))
                recorded[key] = (*self._record(x, dtype), places)
            else:
                recorded[key][1].refresh()
            self._fresh.add(key)
        logits = recorded[key][0](_Apart.apply(x)).clone()
        for hook in _counting(model):  # a replay runs no module
            hook(model, (x,), logits)
        return logits

    def _record(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Any, Folded]:
        # Of its own, since the weights that it folds must stay where they are.
        folded = Folded(self.folded.model, fold=self.folded.fold, channels_last=self.folded.channels_last)
        sample = x.detach().clone().requires_grad_()
        # What autocast has cached would belong to the graph.
        with _uncounted(folded.model), torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            with torch.no_grad():
                folded(sample)  # looks at the network, and folds, outside of the graph
            return torch.cuda.make_graphed_callables(folded, (sample,)), folded


def _counting(model: nn.Module) -> list[Callable[..., None]]:
    """Hooks of the network's modules that count its passes."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "counts_only", False)]


@contextmanager
def _uncounted(model: nn.Module) -> Iterator[None]:
    """Recording takes several passes; nobody counts them."""
    kept = [(module, module._forward_hooks) for module in model.modules() if module._forward_hooks]
    try:
        for module, hooks in kept:
            counting = {key for key, hook in hooks.items() if getattr(hook, "counts_only", False)}
            module._forward_hooks = OrderedDict((key, hook) for key, hook in hooks.items() if key not in counting)
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks


class _Apart(torch.autograd.Function):
    """The identity, whose gradient is a tensor of its own: the graph writes into its own one again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()
