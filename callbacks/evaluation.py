"""The callback that measures a network on clean and attacked samples."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..data.dealer import Dealer
from ..metrics.scoreboard import Row, best_of
from ..nets.averages import Average, averages_in
from ..nets.grouped import group_classes
from .gates import refuse_cut_gates
from .outcome import EvaluationAttack, Outcome, check_index, check_names
from .track import Track, log_rows, twins
from .weights.averaging import MAX, WeightAverage, begun_averages


class RobustEvaluation(Callback):
    """Reports clean accuracy and that under each attack among the trainer's callbacks, in validation, test and predict.

    It is added by itself wherever an attack or one of our methods is; name it only to change its settings. It works with any
    LightningModule whose forward maps pixels to logits. A method's ``<stage>_step`` may return ``{"logits": ...}`` to spare
    the clean forward pass. Costs one forward pass for each attack, beside the attack itself.

    A dynamic network (:class:`robust_pl.nets.RoutedNet`) whose gates are cut off from gradients is refused before any attack
    runs, see :func:`robust_pl.callbacks.gates.refuse_cut_gates`.

    Where the data have ``class_groups`` (ImageNet-A, ObjectNet, ...), the module gives the logits of those alone while it is
    evaluated, to attacks and analyses, too.

    Averaged weights (:class:`EMA`, :class:`SWA`) that there are in the training, or in the checkpoint that is evaluated, are
    measured beside the raw ones, which costs the same once more for each. Where there is an average among the trainer's
    callbacks, begun or not, validation also logs ``val_max/...``: of ``acc``, ``worst_class``, ``worst_tenth`` and ``fair``,
    the higher figure of the raw weights and all averages. ``--run.monitor val_max/acc_pgd10`` thus keeps the best of raw and
    averaged weights over all epochs, as the FastAT benchmark chooses (Pan and Yao 2026, arXiv 2604.22853), but for epochs that
    are equal: the first of them counts, there the one of higher clean accuracy. ``best.ckpt`` holds both kinds of weights;
    which of them had the figure is told by ``val/acc_pgd10`` and ``val_ema/acc_pgd10`` of its epoch in ``metrics.csv`` (raw
    ones where they are equal).

    Logged as ``val/...`` and ``test/...``, or for an average ``val_ema/...`` and ``test_ema/...``: ``acc_clean``,
    ``acc_<attack>``, ``acc_worst`` (right in all of them), and what each attack cost; ``loss`` is the clean cross-entropy. How
    alike classes fare say, for ``clean``, each attack and ``worst``:

    - ``worst_class_...``: accuracy of the worst class.
    - ``worst_tenth_...``: mean of the worst ceil(K / 10) classes; up to ten classes that is the worst one.
    - ``nsd_...``: population standard deviation of the class accuracies over their mean, smaller where it is fairer; missing
      where no sample is right.
    - ``fair_...``: accuracy plus worst class, which chooses a checkpoint by both (``--run.monitor val/fair_pgd20``).
    - ``class_acc_.../<class>``: of each class, in test alone, and given to loggers and the store only.

    Classes without a sample are left out.

    Args:
        num_classes: number of classes; None asks the module, then the data module.
        output_dir: folder of the store that keeps the outcome of every sample of test and predict, see
            :mod:`robust_pl.callbacks.store.store`; None keeps none. Where it holds the beginning of the same evaluation, that
            goes on. An average has its own beside it, ``<output_dir>-ema``.
        save_adversarial: keep the adversarial images, too, without which the evaluation cannot be audited.
        averages: evaluate averaged weights, too.
    """

    request: dict[str, Any] | None = None
    """All that determines the result, as the command line knows it; None takes the attacks' own settings."""
    notes: dict[str, Any] | None = None
    """What the store should say of where the evaluation comes from."""

    def __init__(
        self,
        num_classes: int | None = None,
        output_dir: str | None = None,
        save_adversarial: bool = True,
        averages: bool = True,
    ) -> None:
        self.num_classes, self.output_dir, self.save_adversarial = num_classes, output_dir, save_adversarial
        self.averages = averages
        self.tracks: list[Track] = [Track()]
        """One for the raw weights, and one for each average."""
        self._limit: int | float = 1.0
        self._seen = 0
        self._grouping: RemovableHandle | None = None
        self._dealer = Dealer()

    @staticmethod
    def ensure(trainer: Trainer) -> RobustEvaluation:
        """The trainer's evaluation, added if it has none."""
        for callback in trainer.callbacks:
            if isinstance(callback, RobustEvaluation):
                return callback
        evaluation = RobustEvaluation()
        trainer.callbacks.append(evaluation)
        return evaluation

    @property
    def rows(self) -> list[Row]:
        """The table of the raw weights."""
        return self.tracks[0].rows

    @property
    def last(self) -> tuple[Tensor, Outcome] | None:
        """Clean pixels of the last batch, and what happened to them with the raw weights."""
        return self.tracks[0].last

    @property
    def finished(self) -> frozenset[int]:
        """First samples of the batches that an earlier, interrupted evaluation finished, and that this one leaves out."""
        return frozenset.intersection(*(track.finished for track in self.tracks))

    def _open_stores(self, trainer: Trainer, stage: str) -> None:
        """Before the data are read, so that finished batches are not."""
        if not self.output_dir or stage not in ("test", "predict"):
            return
        # Processes that a cluster started do not know of each other's folders.
        folder = Path(trainer.strategy.broadcast(self.output_dir))
        attacks = self._named_attacks(trainer, stage)
        for track in self.tracks:
            if not track.is_open:
                track.open(trainer, folder, self.request, self.notes, attacks, self.save_adversarial)
        if hasattr(trainer.datamodule, "leave_out"):
            limit = self._limit if self.finished else 1.0
            trainer.datamodule.leave_out(self.finished, limit)
            setattr(trainer, f"limit_{stage}_batches", 1.0 if self.finished else self._limit)  # of what is left

    def _named_attacks(self, trainer: Trainer, stage: str) -> dict[str, EvaluationAttack]:
        attacks = [c for c in trainer.callbacks if isinstance(c, EvaluationAttack) and stage in c.stages]
        names = [attack.name or type(attack).__name__.lower() for attack in attacks]
        check_names(names)
        return dict(zip(names, attacks, strict=True))

    def _follow(self, averages: list[Average]) -> None:
        """Evaluate these averages beside the raw weights, and no others."""
        for track in self.tracks[1:]:
            track.close()
        self.tracks[1:] = [Track(average) for average in averages] if self.averages else []

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.state.fn == "fit":
            averages = begun_averages(trainer) if self.averages else []
            for average in averages:
                average.ready(trainer, pl_module)
            self._follow([Average(average.name, average.weights) for average in averages])
        self._ungroup()
        groups = getattr(trainer.datamodule, "class_groups", None)
        if groups is not None:
            self._grouping = group_classes(pl_module, groups)
        classes = self.num_classes or (len(groups) if groups is not None else getattr(pl_module, "num_classes", None))
        classes = classes or getattr(trainer.datamodule, "num_classes", None)
        if classes is None:
            raise ValueError(
                "num_classes is unknown: give the module num_classes, or the trainer RobustEvaluation(num_classes)"
            )
        if trainer.world_size > 1:
            self._dealer.begin(trainer.strategy.broadcast(secrets.token_hex(8)))
        self._seen = 0
        attacks, fitted = self._named_attacks(trainer, stage), self.tracks[0].fitted
        own = [attacks, *(twins(attacks, fitted) for _ in self.tracks[1:])]
        for track, its_attacks in zip(self.tracks, own, strict=True):
            track.start(trainer, pl_module, stage, its_attacks, classes)

    def _batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        x, y, index = batch[0], batch[1], _index(trainer, batch, self._seen)
        if not self._seen and self.tracks[0].attacks and (trainer.state.fn != "fit" or trainer.sanity_checking):
            refuse_cut_gates(pl_module, x)
        self._seen += len(x)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        for track in self.tracks:
            track.batch(trainer, pl_module, x, y, index, logits if track.average is None else None)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for track in self.tracks:
            track.finish(trainer, pl_module, stage)
        if stage == "validate" and self.averages and any(isinstance(c, WeightAverage) for c in trainer.callbacks):
            log_rows(pl_module, f"val_{MAX}", best_of(*(track.rows for track in self.tracks)))

    def _ungroup(self) -> None:
        """Leave the network as it was."""
        if self._grouping is not None:
            self._grouping.remove()
            self._grouping = None

    def _report(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero and self.rows:
            for track in self.tracks:
                track.report(stage)
            if not self.tracks[0].attacks:
                Console().print("No attacks were given: only clean accuracy was measured.")

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.tracks[:] = [self.tracks[0].again()]
        if hasattr(trainer.datamodule, "deal"):
            trainer.datamodule.deal(self._dealer)
        if stage == "fit":
            return
        self._follow([Average(average.name, average.weights) for average in begun_averages(trainer)])
        if stage != "validate":
            self._limit = getattr(trainer, f"limit_{trainer.state.fn.value}_batches")
            self._open_stores(trainer, trainer.state.fn.value)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            return
        self._follow(averages_in(checkpoint))
        self._open_stores(trainer, trainer.state.fn.value)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ungroup()
        for track in self.tracks:
            track.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # DDP would send its buffers before every forward pass, and processes with unequal numbers of batches would wait for
        # each other. Once is enough: nothing moves them before the next training step.
        ddp = trainer.strategy.model
        if isinstance(ddp, DistributedDataParallel):
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)
            ddp.require_forward_param_sync = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module, "predict")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batch(trainer, pl_module, outputs, batch)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "predict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True
        self._ungroup()
        if trainer.state.fn == "validate":
            self._report(trainer, "validate")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ungroup()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ungroup()
        self._report(trainer, "test")
        if trainer.is_global_zero:
            for track in self.tracks:
                track.log_classes(trainer, "test")


def _index(trainer: Trainer, batch: Any, seen: int) -> Tensor:
    """Positions of a batch; those of a user's own (x, y) loader are counted."""
    if len(batch) > 2:
        return check_index(batch[2], len(batch[0]))
    if trainer.world_size > 1:
        raise ValueError(
            "batches of (x, y) do not say which samples they hold, and several processes could count some of them twice: "
            "give (x, y, index), as robust_pl.data does, or evaluate in one process"
        )
    return torch.arange(seen, seen + len(batch[0]))
