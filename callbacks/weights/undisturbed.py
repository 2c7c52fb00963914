"""Ask a method what it trains on, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Afterwards random streams, buffers, the attack's counts and the module's own tensors and numbers are as before.

    What a method keeps elsewhere than in itself (tensors, numbers, lists and dicts of them), it must put back itself. Nothing
    that the module logs meanwhile is logged.
    """
    attack = getattr(module, "attack", None)
    counts = attack.training_state() if attack is not None else None
    undo = [_undo(buffer) for buffer in module.buffers()]
    own = {name: value for name, value in vars(module).items() if not name.startswith(("_parameters", "_buffers", "_modules"))}
    undo += [_undo(value) for value in own.values()]
    cuda = [module.device] if module.device.type == "cuda" else []
    # Lightning refuses to log where an evaluation begins, and what is logged here belongs to no step.
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for action in undo:
                action()
        for name in ("log", "log_dict", *(vars(module).keys() - own.keys() - {"_parameters", "_buffers", "_modules"})):
            vars(module).pop(name, None)
        vars(module).update(own)
        if attack is not None:
            attack.load_training_state(counts)


def _undo(value: Any) -> Callable[[], None]:
    """What brings back the content of a tensor, or of a list or dict of such."""
    if isinstance(value, Tensor):
        kept = value.detach().clone()
        return lambda: _write(value, kept)
    if isinstance(value, list):
        items, inner = list(value), [_undo(item) for item in value]
        return lambda: _refill(value.clear, lambda: value.extend(items), inner)
    if isinstance(value, dict):
        pairs, inner = dict(value), [_undo(item) for item in value.values()]
        return lambda: _refill(value.clear, lambda: value.update(pairs), inner)
    return lambda: None


def _write(tensor: Tensor, content: Tensor) -> None:
    tensor.detach().copy_(content)


def _refill(clear: Callable[[], None], fill: Callable[[], None], inner: list[Callable[[], None]]) -> None:
    clear()
    fill()
    for action in inner:
        action()
