"""The base of weight averages: copies of the trained weights that follow the training and are evaluated beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ...nets.averages import Average, tensors_of
from ...nets.reference import AVERAGES_KEY
from .recompute import recompute, statistics_of, training_modes

RAW, MAX = "raw", "max"
RECOMPUTED = ("method", "clean")
Buffers = Literal["copy", "average", "method", "clean"]


class WeightAverage(Callback, ABC):
    """Averaged weights beside the raw ones, which train on as if the average were not there.

    A subclass says when :meth:`begin` copies and :meth:`move` follows; only real optimizer steps count, after whatever a
    weight perturbation did was undone. Validation, test and predict evaluate raw and averaged weights, see
    :class:`robust_pl.callbacks.RobustEvaluation`; checkpoints hold both, and ``PATH#<name>`` names the average wherever
    weights are asked for. Averaged are the parameters that an optimizer moves, in float32 at least; frozen networks and
    parameters are not copied.

    Args:
        name: of the average: ``val_<name>/...``, ``PATH#<name>``.
        buffers: running statistics of BatchNorm under the averaged weights: ``copy`` takes those of the raw ones, ``average``
            follows them like parameters, ``method`` and ``clean`` compute them again, see
            :func:`robust_pl.callbacks.weights.recompute.recompute`, once for each average that is evaluated or saved.
        batches: training batches of each process to compute them again from.

    Raises:
        ValueError: if the name is not usable, or another average has it.
    """

    def __init__(self, name: str, buffers: Buffers, batches: int) -> None:
        if name in (RAW, MAX) or not name.replace("_", "").isalnum():
            raise ValueError(
                f"name={name!r} of an average: use letters, digits and _, and neither {RAW!r} nor {MAX!r}, which is the higher "
                "figure of all weights; it becomes val_<name>/..."
            )
        if buffers not in get_args(Buffers):
            raise ValueError(f"buffers={buffers!r} is unknown: choose one of {', '.join(get_args(Buffers))}")
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1: BatchNorm's statistics are computed again from them")
        self.name, self.buffers, self.batches = name, buffers, batches
        self.weights: dict[str, Tensor] = {}
        """Averaged tensors by their names in the module's state dict; empty before the average begins."""
        self._live: list[Tensor] = []
        self._averaged: list[Tensor] = []
        self._step = 0
        self._stale = False
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def begun(self) -> bool:
        """Whether there is an average yet."""
        return bool(self.weights)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Evaluate ``module`` with the averaged weights; afterwards the raw ones are back, bit for bit."""
        with Average(self.name, self.weights).applied(module):
            yield

    # For subclasses --------------------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        """Called after each batch in which the optimizer made ``steps`` > 0 steps."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """How far the average is, for the checkpoint: plain numbers."""

    @abstractmethod
    def load_progress(self, progress: dict[str, Any]) -> None:
        """Go on where :meth:`progress` was taken."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start as a copy of the weights."""
        self.weights = {name: _wide(tensor).clone() for name, tensor in self._tracked(trainer, pl_module).items()}
        self._connect(trainer, pl_module)
        self._stale = True

    def move(self, weight: float | Tensor) -> None:
        """Go the share ``weight`` of the way to the weights: a number, or a 0-dim tensor, for which nothing waits."""
        live = [t if t.dtype == a.dtype else t.to(a.dtype) for t, a in zip(self._live, self._averaged, strict=True)]
        if isinstance(weight, Tensor):
            way = torch._foreach_sub(live, self._averaged)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(self._averaged, way)
        else:
            torch._foreach_lerp_(self._averaged, live, weight)
        self._stale = True

    # Which tensors ---------------------------------------------------------------------------------------------------

    def _tracked(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Live tensors to average, by name; tied ones under each of their names."""
        moved = {p.data_ptr() for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        saved = pl_module.state_dict().keys()  # without what is frozen
        statistics = statistics_of(pl_module) if self.buffers != "copy" else set()
        found = {name: tensor for name, tensor in tensors_of(pl_module).items() if name in saved}
        return {name: t for name, t in found.items() if name in statistics or t.data_ptr() in moved}

    def _connect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pair averaged with live tensors, each pair once; statistics that are computed again do not follow."""
        computed = statistics_of(pl_module) if self.buffers in RECOMPUTED else set()
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for name, live in self._tracked(trainer, pl_module).items():
            averaged = self.weights.get(name)
            if averaged is None or averaged.shape != live.shape:
                raise ValueError(
                    f"the average {self.name!r} in the checkpoint lacks {name} {tuple(live.shape)}: go on with the settings of "
                    "the run, or start a new run from its weights with --model.init_args.weights"
                )
            self.weights[name] = averaged.to(live.device)
            if name not in computed:
                self.weights[name] = pairs.setdefault(live.data_ptr(), (live, self.weights[name]))[1]
        self._live, self._averaged = ([pair[side] for pair in pairs.values()] for side in (0, 1))

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        names = [callback.name for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        if names.count(self.name) > 1:
            raise ValueError(f"two averages are named {self.name!r}: give each its own name, or leave one out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self.begun:
            self._connect(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._modes:
            self._modes = training_modes(pl_module)
        steps, self._step = trainer.global_step - self._step, trainer.global_step
        if steps > 0:
            self.update(trainer, pl_module, steps)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.begun:
            rank_zero_warn(
                f"the run ended before the average {self.name!r} began, so none was evaluated or saved: let it begin earlier"
            )

    def ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring BatchNorm's statistics up to date, in every process alike: before the average is evaluated or saved."""
        recomputed = self.buffers in RECOMPUTED
        if not self.begun or not self._stale or (recomputed and trainer.train_dataloader is None):
            return
        self._stale = False
        statistics = sorted(statistics_of(pl_module) & self.weights.keys())
        if recomputed and statistics:
            # From the raw statistics, so that an average's do not depend on how often they were computed.
            moved = {name: tensor for name, tensor in self.weights.items() if name not in statistics}
            with Average(self.name, moved).applied(pl_module):
                found = recompute(trainer, pl_module, self._modes, self.batches, clean=self.buffers == "clean")
            self.weights.update({name: _wide(found[name]) for name in statistics})
        elif trainer.world_size > 1:
            for name in statistics:  # each process followed its own; the first one's count, as with raw weights
                torch.distributed.broadcast(self.weights[name], 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.ready(trainer, pl_module)
        saved = {"weights": dict(self.weights), "progress": {**self.progress(), "stale": self._stale}}
        checkpoint.setdefault(AVERAGES_KEY, {})[self.name] = saved

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(AVERAGES_KEY, {}).get(self.name)
        if saved is None:
            return
        self.weights = {name: tensor.clone() for name, tensor in saved["weights"].items()}
        self._stale = saved["progress"]["stale"]
        self.load_progress(saved["progress"])


def begun_averages(trainer: Trainer) -> list[WeightAverage]:
    """The averages among the trainer's callbacks that there are yet."""
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage) and callback.begun]


def _wide(tensor: Tensor) -> Tensor:
    """In half precision a small step towards the weights would be rounded away."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
