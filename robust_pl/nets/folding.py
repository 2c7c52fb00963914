"""The same network in less time, for attacks: in eval mode BatchNorm is folded into the convolution before it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..functional.gradients import compiled_parts
from .epilogue import Shifted

Pair = tuple[nn.Conv2d, nn.BatchNorm2d | nn.SyncBatchNorm]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Folded:
    """A network as an attack asks it: the same logits but for rounding, with BatchNorm folded and channels last.

    The network is not changed and no module is replaced: while it runs, each convolution that one BatchNorm alone reads takes
    weights with that BatchNorm in them, and the BatchNorm passes on what it gets. Which they are is seen once for each network
    and shape of images, see :func:`look_at`; every pass checks that each BatchNorm gets the result of its own convolution, and
    else is run again as it is. Left as they are: convolutions and BatchNorms of other classes than torch's own, in train mode,
    parametrised or with hooks (but those that say ``hook.counts_only = True``); and networks that are compiled, sharded, or
    recompute activations in their backward pass.

    The weights must not change while it is in use: make one for each call of an attack, or :meth:`refresh` it. It costs no
    pass, and a copy of the convolutions' weights as long as it lives; the first for a network costs one pass of two images.

    Args:
        model: maps pixels (B, C, H, W) to logits (B, K).
        fold: fold BatchNorm.
        channels_last: show the network images in channels-last memory format, if it takes them.
        late_bias: leave the bias to the ReLU that follows, see :class:`robust_pl.nets.epilogue.Shifted`. It takes the host
            longer and the device less long, so it is for what is recorded once and replayed.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True, channels_last: bool = True, late_bias: bool = False) -> None:
        self.model, self.channels_last, self.late_bias = model, channels_last, late_bias
        self.fold = fold and not compiled_parts(model) and not any(isinstance(p, DTensor) for p in model.parameters())
        self._pairs: list[Pair] | None = None
        self._weights: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        plan = look_at(self.model, x)
        if self.channels_last and plan.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.fold and plan.pairs:
            try:
                with self._folding(plan.pairs):
                    logits = self.model(x)
                    if self._made:
                        raise _OtherWay
                return logits.whole() if isinstance(logits, Shifted) else logits
            except _OtherWay:
                plan.pairs.clear()
        return self.model(x)

    def refresh(self) -> None:
        """Fold the weights as they are now into the tensors that are in use."""
        for kept in self._weights.values():
            _fold(self._pairs or [], kept)

    @contextmanager
    def _folding(self, pairs: list[Pair]) -> Iterator[None]:
        if self._pairs is None:
            self._pairs = list(pairs)
        folded = [(i, pair) for i, pair in enumerate(self._pairs) if not pair[1].training and not any(map(_is_special, pair))]
        self._made.clear()
        try:
            for i, (conv, norm) in folded:
                conv.forward = partial(self._convolve, i, conv)
                norm.forward = partial(self._pass_on, i)
            yield
        finally:
            for _, pair in folded:
                for module in pair:
                    del module.forward
            self._made.clear()

    def _convolve(self, i: int, conv: nn.Conv2d, z: Tensor) -> Tensor:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise _OtherWay  # activations are to be computed again later, and by then this convolution is itself
        kind = z.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else conv.weight.dtype
        if dtype not in self._weights:
            pairs = self._pairs or []
            self._weights[dtype] = _room(pairs, dtype, self.channels_last)
            _fold(pairs, self._weights[dtype])
        weight, bias = self._weights[dtype][i]
        made = conv._conv_forward(z, weight, None if self.late_bias else bias)
        self._made[i] = made, bias
        return made

    def _pass_on(self, i: int, z: Tensor) -> Tensor:
        made, bias = self._made.pop(i, (None, None))
        if z is not made:
            raise _OtherWay
        return Shifted((z,), bias) if self.late_bias else z


@dataclass
class Plan:
    """What is known of a network that is shown images of one shape.

    Args:
        pairs: convolutions and the BatchNorm that alone reads what they return; each runs once a pass.
        channels_last: whether the network takes images in channels-last memory format.
    """

    pairs: list[Pair] = field(default_factory=list)
    channels_last: bool = False


_PLANS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Plan]] = WeakKeyDictionary()


def look_at(model: nn.Module, x: Tensor) -> Plan:
    """What can be done about a network: known already, or seen in one pass of two images of ``x`` (B, C, H, W).

    That pass goes through a shallow copy without hooks, so that nobody counts it, and puts random streams back.
    """
    plans = _PLANS.setdefault(model, {})
    shape = tuple(x.shape[1:])
    if shape not in plans:
        few, convolves = x[:2].detach(), any(isinstance(module, nn.Conv2d) for module in model.modules())
        convolves = convolves and not any(isinstance(module, FSDPModule) for module in model.modules())  # no copy would run
        formats = (torch.channels_last, torch.contiguous_format) if convolves else ()
        plans[shape] = next((plan for kind in formats if (plan := _watched(model, few, kind)) is not None), Plan())
    return plans[shape]


def _watched(model: nn.Module, x: Tensor, memory_format: torch.memory_format) -> Plan | None:
    """None if the network does not run so: one that cuts its input up by ``view()`` wants it contiguous, say."""
    copies: dict[nn.Module, nn.Module] = {}
    copy = _shallow_copy(model, copies)
    watch = _Watch(copies)
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad(), watch:
            copy(x.contiguous(memory_format=memory_format))
    except Exception:  # whatever a network says to two images is said again, and heard, when it is asked in earnest
        return None
    return Plan(watch.pairs(), memory_format is torch.channels_last)


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
        self.at_work: nn.BatchNorm2d | None = None
        for module, copy in copies.items():
            if type(module) is nn.Conv2d and not _is_special(module):
                copy.register_forward_hook(partial(self._made, module))
            elif (
                type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
                and not _is_special(module)
                and module.running_mean is not None
            ):
                copy.register_forward_pre_hook(partial(self._begins, module))
                copy.register_forward_hook(self._ends)

    def pairs(self) -> list[Pair]:
        found = [(self.made[key][0], norm) for key, norm in self.readers.items() if norm is not None]
        return [pair for pair in found if all(self.calls[module] == 1 for module in pair)]

    def _made(self, conv: nn.Conv2d, copy: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls[conv] += 1
        self.made[id(output)] = conv, output

    def _begins(self, norm: nn.BatchNorm2d, copy: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls[norm] += 1
        self.at_work = norm

    def _ends(self, *_: Any) -> None:
        self.at_work = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for read in tree_leaves((args, kwargs)):
            if id(read) in self.made:
                known = self.readers.get(id(read), self.at_work)
                self.readers[id(read)] = known if known is self.at_work else None
        return func(*args, **(kwargs or {}))


class _OtherWay(Exception):
    """The network went another way through its layers than when it was looked at."""


def _is_special(module: nn.Module) -> bool:
    if "forward" in vars(module) or hasattr(module, "parametrizations"):
        return True
    return any(not getattr(hook, "counts_only", False) for hooks in _HOOKS for hook in getattr(module, hooks).values())


def _shallow_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same tensors in other modules, in eval mode, without hooks, not compiled; ``copies`` gets each module's."""
    if module not in copies:
        copy = copies[module] = module.__new__(type(module))
        bare = {hooks: OrderedDict() for hooks in _HOOKS} | {"_compiled_call_impl": None, "training": False}
        copy.__dict__ = vars(module) | bare
        children = module._modules.items()
        copy.__dict__["_modules"] = {name: None if child is None else _shallow_copy(child, copies) for name, child in children}
    return copies[module]


def _room(pairs: list[Pair], dtype: torch.dtype, channels_last: bool) -> list[tuple[Tensor, Tensor]]:
    """Where weight and bias of each convolution with its BatchNorm in it are to be."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weights = [torch.empty_like(conv.weight, dtype=dtype, memory_format=memory_format) for conv, _ in pairs]
    return [(weight, weight.new_empty(len(weight))) for weight in weights]


def _fold(pairs: list[Pair], into: list[tuple[Tensor, Tensor]]) -> None:
    """Write weight and bias of each convolution with its BatchNorm in it, in few kernels."""
    convs, norms = zip(*pairs, strict=True)
    with torch.no_grad():
        gain = [torch.ones_like(norm.running_var) if norm.weight is None else norm.weight for norm in norms]
        offset = [torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias for norm in norms]
        shift = [norm.running_mean if conv.bias is None else norm.running_mean - conv.bias for conv, norm in pairs]
        deviation = torch._foreach_sqrt(torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms]))
        scale = torch._foreach_div(gain, deviation)
        torch._foreach_copy_([bias for _, bias in into], torch._foreach_addcmul(offset, shift, scale, value=-1))
        for conv, factor, (weight, _) in zip(convs, scale, into, strict=True):
            torch.mul(conv.weight, factor.view(-1, 1, 1, 1), out=weight)
