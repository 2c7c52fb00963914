"""BatchNorm's running statistics computed again, for weights that no training step has forwarded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...nets.statistics import untracked
from .undisturbed import undisturbed

Modes = list[tuple[nn.Module, bool]]


def statistics_of(module: nn.Module) -> set[str]:
    """Names, in the state dict, of the running statistics of all BatchNorm layers that are not frozen."""
    names = {f"{name}.{key}".lstrip(".") for name in _layers(module) for key in ("running_mean", "running_var")}
    return names & module.state_dict().keys()


def training_modes(module: nn.Module) -> Modes:
    """Which submodules are in train mode."""
    return [(part, part.training) for part in module.modules()]


def recompute(trainer: Trainer, pl_module: LightningModule, modes: Modes, batches: int, clean: bool) -> dict[str, Tensor]:
    """Statistics over the first training batches of the epoch: means over all forward passes, processes included.

    The method crafts its examples and forwards its loss, each batch once, in the modes of its training and without gradients
    of weights; or it forwards the clean images. Where an attack runs in eval mode it sees the statistics that the module has.
    Nothing moves: neither these, nor random streams, nor the method's tensors. A layer that no forward pass reaches keeps its
    statistics. Where the method has no ``craft``, clean images are forwarded.

    Args:
        trainer: whose training data are read.
        pl_module: with the weights in question.
        modes: of training, see :func:`training_modes`.
        batches: of each process.
        clean: forward clean images.
    """
    with torch.inference_mode(False):  # in which an evaluation may run, and whose tensors could not be written to
        return _recompute(trainer, pl_module, modes, batches, clean)


def _recompute(trainer: Trainer, pl_module: LightningModule, modes: Modes, batches: int, clean: bool) -> dict[str, Tensor]:
    layers = _layers(pl_module)
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    with undisturbed(pl_module), _in(modes, pl_module), untracked(pl_module), _frozen(pl_module):
        for batch in islice(_training_batches(trainer), batches):
            with _stage_of_training(trainer):  # in which a data module augments what it moves to the device
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            with trainer.precision_plugin.train_step_context():
                if clean or not hasattr(pl_module, "craft"):
                    with _filling(layers, sums):
                        pl_module(batch[0])
                else:
                    example = pl_module.craft(batch)
                    with _filling(layers, sums):
                        pl_module.loss(example)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found |= {f"{name}.{key}".lstrip("."): value for key, value in sums[name].over_processes(layer, trainer).items()}
    return found


class _Sums:
    """Statistics of one layer, as BatchNorm itself fills them: without momentum they are means over forward passes."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.buffers = {name: None if b is None else torch.zeros_like(b) for name, b in layer._buffers.items()}

    def over_processes(self, layer: _BatchNorm, trainer: Trainer) -> dict[str, Tensor]:
        passes = self.buffers["num_batches_tracked"]
        found = {}
        for key in ("running_mean", "running_var"):
            total = torch.stack([self.buffers[key].double() * passes, passes.double().expand_as(self.buffers[key])])
            if trainer.world_size > 1:
                torch.distributed.all_reduce(total)
            mean = total[0] / total[1].clamp(min=1)
            found[key] = torch.where(total[1] > 0, mean.to(layer._buffers[key].dtype), layer._buffers[key])
        return found


@contextmanager
def _filling(layers: dict[str, _BatchNorm], sums: dict[str, _Sums]) -> Iterator[None]:
    kept = [(layer, dict(layer._buffers), layer.momentum) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            layer._buffers.update(sums[name].buffers)
            layer.momentum = None
        yield
    finally:
        for layer, buffers, momentum in kept:
            layer._buffers.update(buffers)
            layer.momentum = momentum


@contextmanager
def _in(modes: Modes, module: nn.Module) -> Iterator[None]:
    before = training_modes(module)
    try:
        module.train()
        for part, training in modes:
            part.training = training
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients of pixels, which attacks need, and none of weights."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _stage_of_training(trainer: Trainer) -> Iterator[None]:
    before, trainer.state.stage = trainer.state.stage, RunningStage.TRAINING
    try:
        yield
    finally:
        trainer.state.stage = before


def _training_batches(trainer: Trainer) -> Iterable[Any]:
    """From the beginning of the epoch, without moving the loader that training reads."""
    loader = copy(trainer.train_dataloader)
    if hasattr(loader, "progress"):  # ours, which would go on where training is
        loader.progress = None
        loader.sampler = copy(loader.sampler)
        loader.sampler.set_epoch(trainer.current_epoch)
    return loader


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    found = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    saved = module.state_dict().keys()
    return {name: layer for name, layer in found.items() if f"{name}.running_mean".lstrip(".") in saved}
