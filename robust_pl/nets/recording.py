"""What a recorded pass depends on beside its input, and how those who count passes hear of a replayed one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .folded_layers import HOOKS

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OF_MODULES = {"_parameters", "_buffers", "_modules", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks", *HOOKS}
_DEEP, _LONG = 3, 64


def state(modules: list[nn.Module]) -> tuple[Any, ...]:
    """What modules know beside their parameters and buffers: modes, rates, switches, and those of objects that they hold.

    Of tensors, where they lie; of objects without such attributes, which they are. Lightning modules and metrics count steps
    and updates, which no forward pass depends on: of them it is the mode alone.
    """
    return tuple((id(module), module.training, *(() if _counts(module) else _attributes(module, 0))) for module in modules)


def _counts(module: nn.Module) -> bool:
    return "_trainer" in vars(module) or "_update_count" in vars(module)


def _attributes(thing: Any, depth: int) -> tuple[Any, ...]:
    return tuple((name, _seen(value, depth)) for name, value in vars(thing).items() if name not in _OF_MODULES)


def _seen(value: Any, depth: int) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), tuple(value.shape)
    if isinstance(value, nn.Module) or depth == _DEEP:
        return id(value)
    if isinstance(value, list | tuple | dict | set) and len(value) > _LONG:
        return id(value), len(value)
    if isinstance(value, list | tuple):
        return tuple(_seen(one, depth + 1) for one in value)
    if isinstance(value, dict):
        return tuple((id(key) if not isinstance(key, _SIMPLE) else key, _seen(one, depth + 1)) for key, one in value.items())
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(repr, value)))
    return (id(value), *_attributes(value, depth + 1)) if hasattr(value, "__dict__") and not callable(value) else id(value)


def places(model: nn.Module) -> tuple[int, ...]:
    """Where parameters and buffers lie in memory."""
    return tuple(t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors)


def autocast_dtype() -> torch.dtype | None:
    """On CUDA; None where autocast is off."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def own_cache() -> torch.autocast:
    """The autocast of the moment, without its cache: what is in it would belong to the graph."""
    dtype = autocast_dtype()
    return torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False)


def only_counted(modules: list[nn.Module]) -> bool:
    """Whether no hooks but those that count hang on any module, or on all of them."""
    if nn.modules.module._has_any_global_hook():
        return False
    return all(_only_counts(hook) for module in modules for hooks in HOOKS for hook in module.__dict__[hooks].values())


def count(modules: list[nn.Module], x: Tensor, logits: Tensor) -> None:
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
def uncounted(model: nn.Module) -> Iterator[None]:
    """Recording takes several passes; nobody counts them."""
    hooked = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in hooked]
    try:
        for module, *both in kept:
            module._forward_pre_hooks, module._forward_hooks = (
                OrderedDict((key, hook) for key, hook in hooks.items() if not _only_counts(hook)) for hooks in both
            )
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


def _only_counts(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "counts_only", False)
