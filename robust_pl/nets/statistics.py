"""Running statistics of normalisation layers: forward passes that leave them as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def untracked(modules: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """Let normalisation layers write into copies of their running statistics, which are thrown away afterwards.

    In train mode they still normalise by the batch. Wang et al. 2023 attack so, SAM and AWP take one of their passes so.

    Args:
        modules: a network, or the modules themselves, without their children.
    """
    found = modules.modules() if isinstance(modules, nn.Module) else modules
    layers = [m for m in found if isinstance(m, _NormBase) and m.track_running_stats]
    kept = [dict(layer._buffers) for layer in layers]
    try:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)
