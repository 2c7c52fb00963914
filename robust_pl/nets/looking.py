"""What can be done about a network that is attacked: seen once, on two of its images."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .folded_layers import HOOKS, FoldedLayers, Layers, is_special

_WRAPPERS = (FSDPModule, nn.DataParallel, nn.parallel.DistributedDataParallel)  # a copy of one does not run, or not alone
_CONTAINERS = (list, dict, set, OrderedDict, Counter)
_ALIKE = {torch.float64: 1e-6, torch.float32: 0.01}  # relative; what is wrong, and not rounded, is of the order of 1
_ALIKE_ON_CUDA, _ALIKE_IN_HALF = 0.1, 0.5  # where convolutions round to TF32; and else


@dataclass
class Plan:
    """What is known of a network that is shown images of one shape.

    Args:
        pairs: convolutions and the BatchNorm that alone reads what they return; each runs once a pass.
        channels_last: whether the network takes images in channels-last memory format.
    """

    pairs: list[Layers] = field(default_factory=list)
    channels_last: bool = False


_PLANS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Plan]] = WeakKeyDictionary()


def look_at(model: nn.Module, x: Tensor) -> Plan:
    """What can be done about a network: known already, or seen on two images of ``x`` (B, C, H, W).

    Costs four forward and three backward passes of them, through a shallow copy without hooks, so that nobody counts them: it
    looks who reads what convolutions return, and then folds and compares logits and gradients with those of the network as
    it is. What agrees not even roughly is not done. Buffers, modes and random streams are put back.
    """
    plans = _PLANS.setdefault(model, {})
    shape = _shape(x)
    if shape not in plans:
        modules = list(model.modules())
        if not len(x) or any(is_lazy(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
            return Plan()  # nothing to see yet
        wrapped = any(isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod") for module in modules)
        usual = x.dim() == 4 and not wrapped
        plan = Plan()
        if usual and any(isinstance(module, nn.Conv2d) for module in modules):
            with _aside(model, x):
                plan = _seen(model, x[:2].detach().clone())  # which, if it was one, is an inference tensor no longer
        plans[shape] = plan
    return plans[shape]


def look_again(model: nn.Module, x: Tensor) -> None:
    """Forget what is known for images of this shape, since the network goes another way now."""
    _PLANS.get(model, {}).pop(_shape(x), None)


def _shape(x: Tensor) -> tuple[int, ...]:
    # Of a single image it cannot be told how it lies in memory, and BatchNorm's backward pass on the CPU has been seen to
    # take one that a network cut up and put together again for another: it is looked at by itself.
    return (min(len(x), 2), *x.shape[1:])


def _seen(model: nn.Module, x: Tensor) -> Plan:
    plain = _tried(model, x.contiguous())
    last = x.contiguous(memory_format=torch.channels_last)
    found = _tried(model, last)
    # What cuts images up by view() refuses that format, and a kernel that takes no notice of it returns something else.
    plan = Plan(channels_last=found is not None and (plain is None or alike(found, plain)))
    expected, x = (found, last) if plan.channels_last else (plain, x.contiguous())
    if expected is None:
        return plan
    copies: dict[nn.Module, nn.Module] = {}
    try:
        copied = _shallow_copy(model, copies)
        watch = _Watch(copies)
        with torch.no_grad(), _streams_kept(x), watch:
            copied(x)
        pairs = watch.pairs()
    except Exception:  # whatever a network says to two images is said again, and heard, when it is asked in earnest
        return plan
    if pairs:
        found = _tried(model, x, pairs)
        if found is not None and alike(found, expected):
            plan.pairs = [(ref(conv), ref(norm), tuple(map(ref, on_the_way))) for conv, norm, on_the_way in pairs]
    return plan


def _tried(model: nn.Module, x: Tensor, pairs: list[Any] | None = None) -> tuple[Tensor, ...] | None:
    """Logits, and the gradient of something of them where there is one; None if the network does not run so."""
    copies: dict[nn.Module, nn.Module] = {}
    try:
        copied = _shallow_copy(model, copies)
        folded = [(copies[conv], copies[norm], ()) for conv, norm, _ in pairs or ()]
        x = x.detach().requires_grad_()
        with torch.enable_grad(), _streams_kept(x), FoldedLayers(folded).at_work():
            logits = copied(x)
        return _with_gradient(logits, x)
    except Exception:
        return None


def logits_and_gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Logits (B, K), and the gradient (B, C, H, W) of something of them where there is one."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return _with_gradient(model(x), x)


def _with_gradient(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    if not logits.requires_grad:
        return (logits.detach(),)
    along = torch.linspace(-1, 1, logits.numel(), device=x.device).view_as(logits).cos()
    (gradient,) = torch.autograd.grad((logits.float() * along).sum(), x, allow_unused=True)
    return (logits.detach(),) if gradient is None else (logits.detach(), gradient)


def alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether logits and gradients are the same but for rounding."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return False
    rough = _ALIKE_ON_CUDA if expected[0].is_cuda else 0.0
    tolerance = max(rough, *(_ALIKE.get(tensor.dtype, _ALIKE_IN_HALF) for tensor in (*expected, *found)))
    pairs = [(a.double().nan_to_num(), b.double().nan_to_num()) for a, b in zip(found, expected, strict=True)]
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


class _Watch(TorchDispatchMode):
    """Notes which results of convolutions one BatchNorm reads, and nobody else.

    Args:
        copies: of each module of a network, without hooks; these are what will run.
    """

    def __init__(self, copies: dict[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holding them, so that no two share an id
        self.readers: dict[int, nn.BatchNorm2d | None] = {}
        self.on_the_way: dict[int, list[nn.Module]] = {}
        self.at_work: nn.BatchNorm2d | None = None
        for module, copied in copies.items():
            if type(module) is nn.Conv2d and not is_special(module):
                copied.register_forward_hook(partial(self._made, module))
            elif (
                type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
                and not is_special(module)
                and module.running_mean is not None
            ):
                copied.register_forward_pre_hook(partial(self._begins, module))
                copied.register_forward_hook(self._ends)
            else:
                copied.register_forward_hook(partial(self._passes, module))

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, tuple[nn.Module, ...]]]:
        """Convolution, BatchNorm, and the modules that what goes from one to the other goes into or comes out of."""
        found = [(key, self.made[key][0], norm) for key, norm in self.readers.items() if norm is not None]
        return [
            (conv, norm, tuple(self.on_the_way.get(key, ())))
            for key, conv, norm in found
            if self.calls[conv] == self.calls[norm] == 1
        ]

    def _made(self, conv: nn.Conv2d, copied: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls[conv] += 1
        self.made[id(output)] = conv, output

    def _begins(self, norm: nn.BatchNorm2d, copied: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls[norm] += 1
        self.at_work = norm

    def _ends(self, *_: Any) -> None:
        self.at_work = None

    def _passes(self, module: nn.Module, copied: nn.Module, inputs: Any, output: Any) -> None:
        for given in tree_leaves((inputs, output)):
            if id(given) in self.made:
                self.on_the_way.setdefault(id(given), []).append(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for read in tree_leaves((args, kwargs)):
            if id(read) in self.made:
                known = self.readers.get(id(read), self.at_work)
                self.readers[id(read)] = known if known is self.at_work else None
        return func(*args, **(kwargs or {}))


def _shallow_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tensors in other modules, in eval mode, without hooks, not compiled; ``copies`` gets each module's."""
    if module not in copies:
        copied = copies[module] = module.__new__(type(module))
        bare = {hooks: OrderedDict() for hooks in HOOKS} | {"_compiled_call_impl": None, "training": False}
        copied.__dict__ = {name: _of_copy(value, module, copied) for name, value in vars(module).items()} | bare
        children = module._modules.items()
        copied.__dict__["_modules"] = {
            name: None if child is None else _shallow_copy(child, copies) for name, child in children
        }
    return copies[module]


def _of_copy(value: Any, module: nn.Module, copied: nn.Module) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, copied)
    return copy(value) if type(value) in _CONTAINERS else value


@contextmanager
def _aside(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Modes and buffers are put back: a module that keeps itself in a closure, say, runs itself, and not its copy."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    generators = [(g, g.get_state()) for m in model.modules() for g in vars(m).values() if isinstance(g, torch.Generator)]
    try:
        with torch.inference_mode(False), ExitStack() as undo:
            undo.callback(lambda: [generator.set_state(state) for generator, state in generators])
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, version, before in buffers:
            if buffer._version != version:
                buffer.data.copy_(before)


@contextmanager
def _streams_kept(x: Tensor) -> Iterator[None]:
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
