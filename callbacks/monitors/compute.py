"""What a training costs: passes, FLOPs, seconds, device hours and memory."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric

from ...report.cost import HEADINGS, cost_figures, cost_note, cost_rows
from .memory import PeakMemory, over_runs
from .passes import EVALUATION, TRAINING, Flops, PassCounter, Tally
from .probe import log_figures

COST_KEY = "robust_pl_compute"
COST_FILE = "compute.json"
_MARK = "run.json"


class ComputeMonitor(Callback):
    """Counts what a fit spends, so that methods are compared at equal cost. It never asks which method runs.

    Forward passes, and backward passes with and without gradients of the weights, each once a sample, of every network
    among the module's children (``net``, teachers, ...), or of the module itself where it has no ``net``; see
    :class:`robust_pl.callbacks.monitors.passes.PassCounter` for how. FLOPs are passes times those of one pass, measured on
    two samples at a network's first call. Seconds are wall time; device hours are seconds times devices. Validation,
    monitors and the writing of best and last checkpoints are told apart, in all of these. Passes are counted on each
    process and summed where a checkpoint is written and at the end. ``peak_memory`` is the highest number of bytes that one
    process's training took, validation and monitors left out, and ``peak_memory_of`` says of what: tensors on a GPU, or the
    whole process on a CPU; see :class:`robust_pl.callbacks.monitors.memory.PeakMemory`. Both are null where nothing can be
    measured.

    The totals go into every checkpoint and on where it is resumed, to the loggers as ``cost/...`` at the end of each epoch,
    into ``compute.json`` of the run folder, and into the report of each later test. What a run spent before it was stopped and
    after its last checkpoint is not known to the one that resumes it; nor is what earlier runs spent on weights that it starts
    from. Networks that a method hides from its children are not seen. Costs no pass, but for two samples once.

    Args:
        show: print a table at the end.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.cost: dict[str, Any] | None = None
        self._counters: dict[str, PassCounter] = {}
        self._before: Mapping[str, Any] = {}
        self._samples = 0
        self._phase = TRAINING
        self._seconds = {TRAINING: 0.0, EVALUATION: 0.0}
        self._since: float | None = None
        self._memory: PeakMemory | None = None
        self._device = torch.device("cpu")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is spent here is not the training's."""
        before = self._phase
        self._turn_to(EVALUATION)
        try:
            yield
        finally:
            self._turn_to(before)

    def totals(self, trainer: Trainer, device: torch.device) -> dict[str, Any]:
        """The cost until now, over all processes, which must call this together; plain numbers."""
        self._turn_to(self._phase)
        mine = [self._samples]
        for counter in self._counters.values():
            counter.settle()
            for tally in counter.tallies.values():
                mine += asdict(tally).values()
        summed = torch.tensor(mine, dtype=torch.int64, device=device)
        numbers = iter(trainer.strategy.reduce(summed, reduce_op="sum").tolist())
        before = self._before
        samples = next(numbers) + before.get("samples", 0)
        networks = dict(before.get("networks", {}))
        spent: dict[str, float | None] = {TRAINING: 0.0, EVALUATION: 0.0}
        for name, counter in self._counters.items():
            known = networks.get(name, {})
            flops = counter.flops or (Flops(**known["flops"]) if known.get("flops") else None)
            phases = {
                phase: {kind: next(numbers) + known.get(phase, {}).get(kind, 0) for kind in asdict(tally)}
                for phase, tally in counter.tallies.items()
            }
            networks[name] = {**phases, "flops": None if flops is None else asdict(flops)}
        for network in networks.values():
            for phase, sum_so_far in spent.items():
                if any(network[phase].values()):  # a network that is never called has no FLOPs that could be known
                    flops = network["flops"]
                    unknown = sum_so_far is None or flops is None
                    spent[phase] = None if unknown else sum_so_far + Flops(**flops).of(Tally(**network[phase]))
        seconds, evaluation = self._seconds[TRAINING], self._seconds[EVALUATION]
        return {
            "samples": samples,
            "networks": networks,
            "flops": spent[TRAINING],
            "evaluation_flops": spent[EVALUATION],
            "seconds": seconds + before.get("seconds", 0.0),
            "evaluation_seconds": evaluation + before.get("evaluation_seconds", 0.0),
            "device": "GPU" if device.type == "cuda" else device.type.upper(),
            "devices": trainer.world_size,
            "device_hours": seconds * trainer.world_size / 3600 + before.get("device_hours", 0.0),
            **self._peak(trainer, device),
        }

    def _peak(self, trainer: Trainer, device: torch.device) -> dict[str, Any]:
        """Of the process that took most."""
        memory = self._memory or PeakMemory(device)
        mine = torch.tensor(-1 if memory.peak is None else memory.peak, dtype=torch.int64, device=device)
        peak = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return over_runs(self._before, None if peak < 0 else peak, memory.of)

    def _turn_to(self, phase: str) -> None:
        if phase != self._phase and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is still to be done was asked for in the phase that ends
        now = time.perf_counter()
        if self._since is not None:
            self._seconds[self._phase] += now - self._since
            self._since = now
            if self._phase == TRAINING:
                self._memory.read()
            elif phase == TRAINING:
                self._memory.begin()
        self._phase = phase

    def _forget_hooks(self) -> None:
        for counter in self._counters.values():
            counter.remove()

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._before = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get(COST_KEY) or {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_hooks()
        found = networks_of(pl_module)
        self._counters = {name: PassCounter(net, lambda: self._phase) for name, net in found.items()}
        self._samples, self._phase, self._since, self._memory = 0, TRAINING, None, None
        self._seconds = {TRAINING: 0.0, EVALUATION: 0.0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = pl_module.device
        self._memory = PeakMemory(pl_module.device)
        self._memory.begin()
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples += _samples(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._turn_to(EVALUATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._turn_to(TRAINING)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_figures(trainer, "cost", cost_figures(self.totals(trainer, pl_module.device)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[COST_KEY] = self.totals(trainer, pl_module.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.cost = cost = self.totals(trainer, pl_module.device)
        self._since = None
        log_figures(trainer, "cost", cost_figures(cost))
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        if (folder / _MARK).is_file():
            (folder / COST_FILE).write_text(json.dumps(cost, indent=2) + "\n")
        if self.show:
            table = Table(*HEADINGS, caption=cost_note(cost), caption_justify="left")
            for line in cost_rows(cost):
                table.add_row(*line)
            Console().print(table)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget_hooks()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget_hooks()


def networks_of(pl_module: LightningModule) -> dict[str, nn.Module]:
    """The networks that a module is made of, by name: its children with weights, or itself where it has no ``net``."""
    if not isinstance(getattr(pl_module, "net", None), nn.Module):
        return {"model": pl_module}
    found: dict[str, nn.Module] = {}

    def add(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            for key, child in module.named_children():
                add(f"{name}.{key}", child)
        elif not isinstance(module, Metric) and next(module.parameters(), None) is not None:
            found[name] = module

    for name, child in pl_module.named_children():
        add(name, child)
    return found


@contextmanager
def not_training(trainer: Trainer) -> Iterator[None]:
    """What is spent here counts as evaluation for whoever counts."""
    monitor = next((c for c in trainer.callbacks if isinstance(c, ComputeMonitor)), None)
    if monitor is None:
        yield
        return
    with monitor.evaluating():
        yield


def cost_in(checkpoint: str | Path) -> dict[str, Any] | None:
    """What it cost to train a checkpoint; None if the file does not say."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # the weights stay on disk
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        return None  # weights alone, in another format
    return content.get(COST_KEY) if isinstance(content, dict) else None


def _samples(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return next((n for part in parts if (n := _samples(part))), 0)
