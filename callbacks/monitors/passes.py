"""Passes over one network, counted by hooks, and what one of them costs in FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ...functional.gradients import compiled_parts
from ...nets.folded_layers import aside, counted
from ..attacks.prepare import evaluating

TRAINING, EVALUATION = "training", "evaluation"


@dataclass
class Tally:
    """Passes, each counted once a sample.

    Args:
        forwards: forward passes.
        input_backwards: backward passes that leave the weights out, such as those of an attack.
        weight_backwards: backward passes that reach the weights.
    """

    forwards: int = 0
    input_backwards: int = 0
    weight_backwards: int = 0


@dataclass
class Flops:
    """Floating-point operations of a pass, per sample: two for a multiplication and the sum that takes it up.

    Matrix products, convolutions and attention count, as ``torch.utils.flop_counter`` has it; the rest is small.
    """

    forwards: float = 0.0
    input_backwards: float = 0.0
    weight_backwards: float = 0.0

    def of(self, tally: Tally) -> float:
        """What the passes of a tally cost."""
        return sum(getattr(self, kind) * count for kind, count in asdict(tally).items())


@dataclass
class PassCounter:
    """Counts the passes of one network, under whichever of ``tallies`` is named by ``phase()``.

    At the network's first call it is run on two samples, aside: in eval mode, with its random streams, statistics and gradients
    as they were. That measures the FLOPs, and finds the first layer with weights that runs once a pass. There the hooks sit, so
    that a method which calls ``forward_features`` and ``head`` is counted as well. Compiled networks are counted at their own
    boundary, and so are those for which there is no such layer.

    A gradient that is itself differentiated (GradAlign) counts as one more backward pass, when that happens: on the way it does
    as much work as a backward pass does. Backward passes that end before the first layer do not count.

    Args:
        net: the network.
        phase: says what the passes of the moment are spent on.
    """

    net: nn.Module
    phase: Callable[[], str]
    tallies: dict[str, Tally] = field(default_factory=lambda: {TRAINING: Tally(), EVALUATION: Tally()})
    flops: Flops | None = None

    def __post_init__(self) -> None:
        self._trained = [p for p in self.net.parameters() if p.requires_grad]  # later an attack may have frozen them
        self._pending: tuple[int, str, int] = (-1, TRAINING, 0)
        self._handles: list[RemovableHandle] = []
        self._ready = False

        # Plain functions, since a copy of the network would copy the owner of a bound method with it.
        def first_call(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._ready and inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
                self._ready = True
                self._prepare(module, inputs)

        first_call.counts_only = True  # type: ignore[attr-defined]  # so that it does not stand in the way of folding
        # A method may ask for the features without calling the network: then its first child is the first that is called.
        self._handles += [m.register_forward_pre_hook(first_call) for m in (self.net, *self.net.children())]

    def remove(self) -> None:
        """Take all hooks away."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def settle(self) -> None:
        """Backward passes that have not reached the weights until now have left them out."""
        _, phase, samples = self._pending
        self.tallies[phase].input_backwards += samples
        self._pending = (-1, phase, 0)

    def _prepare(self, called: nn.Module, inputs: tuple[Any, ...]) -> None:
        place: nn.Module | None = None
        try:
            self.flops, place = _measure(self.net, inputs, self._trained)
        except Exception as error:  # whatever a network does on two samples, its training goes on
            if called is not self.net:  # such as a head, whose input is not the network's
                self._ready = False
                return
            warnings.warn(f"the FLOPs of {type(self.net).__name__} are not known: {error}", stacklevel=2)
        place = self.net if place is None or compiled_parts(self.net) else place
        self._watch(place)

    def _watch(self, place: nn.Module) -> None:
        def forwards(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor):  # a step of a module that is its own network
                return
            samples = len(inputs[0])
            self.tallies[self.phase()].forwards += samples
            watched = _first_tensor(counted(output))
            if watched is not None and watched.requires_grad:
                watched.register_hook(lambda gradient: backwards(gradient, samples))

        forwards.counts_only = True  # type: ignore[attr-defined]

        def backwards(gradient: Tensor, samples: int) -> None:
            self._add(samples)
            if gradient.requires_grad:
                gradient.register_hook(lambda _: self._add(samples))

        def weights(_: Tensor) -> None:
            task, phase, samples = self._pending
            if task == torch._C._current_graph_task_id():
                self.tallies[phase].weight_backwards += samples
                self._pending = (-1, phase, 0)

        self._handles.append(place.register_forward_hook(forwards))
        of_place = {id(p) for p in place.parameters()}
        found = next((p for p in self._trained if id(p) in of_place), None)
        if found is not None:
            frozen = not found.requires_grad
            self._handles.append(found.requires_grad_().register_hook(weights))
            found.requires_grad_(not frozen)

    def _add(self, samples: int) -> None:
        # Whether a backward pass goes on to the weights is known at its end, when their own hook runs.
        task, _, before = self._pending
        if task != torch._C._current_graph_task_id():
            self.settle()
            before = 0
        self._pending = (torch._C._current_graph_task_id(), self.phase(), before + samples)


def _measure(net: nn.Module, inputs: tuple[Any, ...], trained: list[nn.Parameter]) -> tuple[Flops, nn.Module | None]:
    """FLOPs a sample, and the first layer with weights that runs exactly once a pass."""
    samples = min(2, len(inputs[0]))
    runs: dict[nn.Module, list[int]] = {}

    def ran(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        runs.setdefault(module, []).append(len(given[0]) if given and isinstance(given[0], Tensor) else -1)

    with _aside(net, inputs[0].device), _trainable(net, trained):
        given = tuple(t[:samples].detach().clone() if isinstance(t, Tensor) and t.dim() else t for t in inputs)
        leaves = [m for m in net.modules() if not list(m.children()) and next(m.parameters(), None) is not None]
        handles = [leaf.register_forward_hook(ran) for leaf in leaves]
        try:
            forwards, output = _counted(lambda: _first_tensor(net(*given)))
        finally:
            for handle in handles:
                handle.remove()
        found = Flops(forwards / samples)
        if trained and output is not None and output.requires_grad:
            flops, _ = _counted(lambda: torch.autograd.grad(output.sum(), trained, allow_unused=True))
            found.weight_backwards = flops / samples
        with _trainable(net, []):
            given[0].requires_grad_()
            output = _first_tensor(net(*given))
            if output is not None and output.requires_grad:
                flops, _ = _counted(lambda: torch.autograd.grad(output.sum(), given[0], allow_unused=True))
                found.input_backwards = flops / samples
    fit = [m for m, seen in runs.items() if seen == [samples]]
    ids = {id(p) for p in trained}
    # Before the first trained layer a training pass has no gradient.
    fit = [m for m in fit if not ids or any(id(p) in ids for p in m.parameters())]
    # Where one network wraps another, what stands beside the inner one may be left out of a pass.
    inner = set(net.net.modules()) if isinstance(getattr(net, "net", None), nn.Module) else set()
    fit.sort(key=lambda m: m not in inner)
    return found, fit[0] if fit else None


def _counted(run: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


@contextmanager
def _aside(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Gradients on, eval mode, nothing compiled or folded; random streams are put back, nothing stays in autocast's cache."""
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(net),
            aside(),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.simplefilter("ignore")  # of hooks that a compiled network would not see: here it is not compiled
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _trainable(net: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Only the ``chosen`` parameters require a gradient."""
    before = [(p, p.requires_grad) for p in net.parameters()]
    ids = {id(p) for p in chosen}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in ids)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
