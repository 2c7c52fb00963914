"""What layers of a network put out, by their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def find_layers(model: nn.Module, names: Sequence[str], field: str = "layers") -> dict[str, nn.Module]:
    """Modules by name; a method's network need not be told from the method: ``layer1`` also finds ``net.layer1``.

    Raises:
        ValueError: if there is no module of a name, or the network is the same for every name.
    """
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        module = modules.get(name) or modules.get(f"net.{name}")
        if not name or module is None:
            known = ", ".join(key for key, _ in model.named_children()) or "none"
            raise ValueError(f"{field} names {name!r}, which the network has not: its first modules are {known}")
        found[name] = module
    return found


@contextmanager
def outputs_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While this lasts, a forward pass leaves here what each layer put out when it was last called."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
