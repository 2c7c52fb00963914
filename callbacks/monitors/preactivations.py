"""What enters the activations of a network, whether they are modules or functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ACTIVATIONS = {
    getattr(place, name)
    for place, names in (
        (
            F,
            (
                "relu",
                "relu_",
                "relu6",
                "leaky_relu",
                "leaky_relu_",
                "prelu",
                "elu",
                "elu_",
                "gelu",
                "silu",
                "mish",
                "hardswish",
            ),
        ),
        (torch, ("relu", "relu_", "prelu")),
        (Tensor, ("relu", "relu_", "prelu")),
    )
    for name in names
}


class _Watch(TorchFunctionMode):
    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ACTIVATIONS:
            # In-place activations overwrite it.
            self.see(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


@contextmanager
def preactivations(layers: Mapping[str, nn.Module] | None, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this lasts, ``see(name, preactivations)`` is called in each forward pass, layer by layer.

    Args:
        layers: modules whose output is taken; None takes what enters each activation, ReLU and its kin, as a module or as a
            function, named by their order: ``activation 1`` and so on.
        see: must take what it needs at once, since the tensor may be overwritten.
    """
    if layers is None:
        count = [0]

        def number(values: Tensor) -> None:
            count[0] += 1
            see(f"activation {count[0]}", values)

        with _Watch(number):
            yield
        return

    def keep(name: str) -> Any:
        return lambda module, inputs, output: see(name, output)

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
