"""A network whose passes are recorded once as CUDA graphs and replayed: for attacks with small batches."""

from __future__ import annotations

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
        return recorded[key][0](_Apart.apply(x)).clone()

    def _record(self, x: Tensor, dtype: torch.dtype | None) -> tuple[Any, Folded]:
        # Of its own, since the weights that it folds must stay where they are.
        folded = Folded(self.folded.model, fold=self.folded.fold, channels_last=self.folded.channels_last)
        sample = x.detach().clone().requires_grad_()
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
            folded(sample)  # looks at the network, and folds, outside of the graph
        # What autocast has cached would belong to the graph.
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            return torch.cuda.make_graphed_callables(folded, (sample,)), folded


class _Apart(torch.autograd.Function):
    """The identity, whose gradient is a tensor of its own: the graph writes into its own one again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()
