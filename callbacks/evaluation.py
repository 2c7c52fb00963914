"""Measure a classifier on clean and attacked samples: the same code with and without a Trainer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..functional import geometry
from ..functional.losses import cross_entropy
from ..metrics.scoreboard import CLEAN, WORST, Row, Scoreboard, as_metrics, as_table
from .attacks.base import Attack, Attacked
from .predictions import PredictionFiles, merge

_STAGE_PREFIX = {"validate": "val", "test": "test", "predict": "predict"}


@dataclass
class Outcome:
    """What happened to each sample of a batch.

    Args:
        index: position in the data set (B,).
        y: labels (B,).
        logits: clean logits (B, K).
        predictions: name of the attack, or ``clean`` -> predicted class (B,).
        attacked: name of the attack -> what it found and spent.
        norms: name of the attack -> size of the perturbation in the attack's norm (B,).
        seconds: name of the attack -> time spent on this batch.
    """

    index: Tensor
    y: Tensor
    logits: Tensor
    predictions: dict[str, Tensor]
    attacked: dict[str, Attacked] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def columns(self) -> dict[str, Tensor]:
        """The batch as columns of a table."""
        confidence = self.logits.float().softmax(1).amax(1)
        columns = {
            "index": self.index,
            "label": self.y,
            "prediction": self.predictions[CLEAN],
            "confidence": confidence,
        }
        for name, norms in self.norms.items():
            columns[f"prediction_{name}"] = self.predictions[name]
            columns[f"norm_{name}"] = norms
        return columns


def attack_batch(
    model: nn.Module,
    attacks: Mapping[str, Attack],
    x: Tensor,
    y: Tensor,
    index: Tensor,
    logits: Tensor | None = None,
) -> Outcome:
    """Run every attack on one batch and judge its result by one more forward pass.

    Args:
        model: maps pixels to logits.
        attacks: by name; their random numbers belong to the samples in ``index``.
        x: pixels (B, C, H, W) in [0, 1].
        y: labels (B,).
        index: position of each sample in its data set (B,).
        logits: clean logits if they are known already.
    """
    with torch.no_grad():
        logits = model(x) if logits is None else logits
    outcome = Outcome(index, y, logits, {CLEAN: logits.argmax(1)})
    for name, attack in attacks.items():
        attack.name = name
        began = _now(x.device)
        attacked = attack.run(model, x, attack.aim(y, logits.shape[1], index), index=index)
        outcome.seconds[name] = _now(x.device) - began
        seen = attacked.x_adv.to(x.dtype)
        with torch.no_grad():
            outcome.predictions[name] = model(seen).argmax(1)
        outcome.attacked[name] = attacked
        # Of what the network saw: in bf16 that is rounded.
        outcome.norms[name] = geometry.size(seen.to(attacked.x_adv.dtype) - x, attack.norm)
    return outcome


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score(board: Scoreboard, outcome: Outcome) -> None:
    """Add a batch to the counts."""
    y, classes = outcome.y, outcome.logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels run from {y.min().item()} to {y.max().item()} and the network has {classes} logits: labels must lie in "
            "[0, num_classes); check the data"
        )
    right = {name: prediction == y for name, prediction in outcome.predictions.items()}
    cost = {name: (a.forwards, a.backwards, outcome.seconds[name]) for name, a in outcome.attacked.items()}
    board.update(y, right, cost, cross_entropy(outcome.logits.float(), y))


def check_names(names: Sequence[str]) -> None:
    """Refuse names of attacks that would hide each other in the report.

    Raises:
        ValueError: if two attacks share a name, or one takes a name that the report uses itself.
    """
    for name in names:
        if name in (CLEAN, WORST):
            raise ValueError(f"an attack is named {name!r}, which the report uses itself: choose another name")
        if names.count(name) > 1:
            raise ValueError(f"two attacks are named {name!r}: give each its own name, since it is the metric's name")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"an attack is named {name!r}: use letters, digits, - and _, since it becomes acc_<name>")


class RobustEvaluation(Callback):
    """Reports clean accuracy and that under each attack among the trainer's callbacks, in validation, test and predict.

    It is added by itself wherever an attack or one of our methods is; name it only to change its settings. It works with any
    LightningModule whose forward maps pixels to logits. A method's ``<stage>_step`` may return ``{"logits": ...}`` to spare
    the clean forward pass. Costs one forward pass for each attack, beside the attack itself.

    Logged as ``val/...`` and ``test/...``: ``acc_clean``, ``acc_<attack>``, ``acc_worst`` (right in all of them),
    ``worst_class_...``, and what each attack cost; ``loss`` is the clean cross-entropy.

    Args:
        num_classes: number of classes; None asks the module, then the data module.
        output_dir: folder for ``predictions.csv``, the outcome of each sample of test and predict; None writes none.
        save_adversarial: write the adversarial images, too.
    """

    def __init__(self, num_classes: int | None = None, output_dir: str | None = None, save_adversarial: bool = False) -> None:
        self.num_classes, self.output_dir, self.save_adversarial = num_classes, output_dir, save_adversarial
        self.rows: list[Row] = []
        self.last: tuple[Tensor, Outcome] | None = None
        self._attacks: dict[str, Attack] = {}
        self._board: Scoreboard | None = None
        self._files: PredictionFiles | None = None
        self._seen = 0

    @staticmethod
    def ensure(trainer: Trainer) -> RobustEvaluation:
        """The trainer's evaluation, added if it has none."""
        for callback in trainer.callbacks:
            if isinstance(callback, RobustEvaluation):
                return callback
        evaluation = RobustEvaluation()
        trainer.callbacks.append(evaluation)
        return evaluation

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attacks = [c for c in trainer.callbacks if isinstance(c, Attack) and stage in c.stages]
        names = [attack.name or type(attack).__name__.lower() for attack in attacks]
        check_names(names)
        self._attacks = dict(zip(names, attacks, strict=True))
        classes = self.num_classes or getattr(pl_module, "num_classes", None)
        classes = classes or getattr(trainer.datamodule, "num_classes", None)
        if classes is None:
            raise ValueError(
                "num_classes is unknown: give the module num_classes, or the trainer RobustEvaluation(num_classes)"
            )
        for name, attack in self._attacks.items():
            if attack.must_fit:
                if trainer.datamodule is None:
                    raise ValueError(f"the attack {name!r} must see training data first: give the trainer a data module")
                if trainer.world_size > 1:
                    raise ValueError(f"the attack {name!r} must see all training data first: evaluate it in one process")
                if not attack.fitted:
                    trainer.datamodule.setup("fit")
                    attack.fit_to(pl_module, trainer.datamodule.train_dataloader())
                    attack.fitted = stage != "validate"  # in validation the network goes on changing
        self._seen = 0
        self._board = Scoreboard(names, classes).to(pl_module.device)
        if self.output_dir and stage != "validate" and not trainer.sanity_checking:
            # Processes that a cluster started do not know of each other's folders.
            folder = trainer.strategy.broadcast(self.output_dir)
            self._files = PredictionFiles(Path(folder), trainer.global_rank)

    def _batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> Outcome:
        x, y, index = batch[0], batch[1], _index(trainer, batch, self._seen)
        self._seen += len(x)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            outcome = attack_batch(pl_module, self._attacks, x, y, index, logits)
        self.last = (x, outcome)
        score(self._board, outcome)
        if self._files is not None:
            self._files.add(outcome.columns())
            if self.save_adversarial:
                for name, attacked in outcome.attacked.items():
                    self._files.add_images(name, index, attacked.x_adv)
        return outcome

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rows = self._board.rows()
        prefix = _STAGE_PREFIX[stage]
        if stage != "predict":
            shown = {f"acc_{CLEAN}", f"acc_{WORST}"} if stage == "validate" else set()
            figures = {"loss": self._board.loss.compute().item(), **as_metrics(self.rows)}
            # The figures are already those of all processes, so nothing is left to synchronise.
            warnings.filterwarnings("ignore", message=f"It is recommended to use `self.log.'{prefix}/.*sync_dist=True")
            for key, value in figures.items():
                pl_module.log(f"{prefix}/{key}", value, prog_bar=key in shown)
        if self._files is not None:
            self._files.close()
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                path = merge(self._files.folder, trainer.world_size)
                Console(soft_wrap=True).print(f"Outcome of every sample: {os.path.relpath(path)}")
            self._files = None

    def _report(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero and self.rows:
            console = Console()
            console.print(as_table(self.rows, stage))
            if not self._attacks:
                console.print("No attacks were given: only clean accuracy was measured.")

    # Lightning's hooks -----------------------------------------------------------------------------------------------

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
        if trainer.state.fn == "validate":
            self._report(trainer, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "test")


def _index(trainer: Trainer, batch: Any, seen: int) -> Tensor:
    """Positions of a batch; those of a user's own (x, y) loader are counted."""
    if len(batch) > 2:
        return batch[2]
    if trainer.world_size > 1:
        raise ValueError(
            "batches of (x, y) do not say which samples they hold, and several processes could count some of them twice: "
            "give (x, y, index), as robust_pl.data does, or evaluate in one process"
        )
    return torch.arange(seen, seen + len(batch[0]))
