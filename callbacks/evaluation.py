"""The callback that measures a network on clean and attacked samples."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..metrics.scoreboard import CLEAN, WORST, Row, Scoreboard, as_metrics, as_table
from .outcome import EvaluationAttack, Keeper, Outcome, attack_batch, check_index, check_names, score
from .progress import watch_attack
from .store.identity import describe, facts_about, replay
from .store.store import Store

_STAGE_PREFIX = {"validate": "val", "test": "test", "predict": "predict"}


class RobustEvaluation(Callback):
    """Reports clean accuracy and that under each attack among the trainer's callbacks, in validation, test and predict.

    It is added by itself wherever an attack or one of our methods is; name it only to change its settings. It works with any
    LightningModule whose forward maps pixels to logits. A method's ``<stage>_step`` may return ``{"logits": ...}`` to spare
    the clean forward pass. Costs one forward pass for each attack, beside the attack itself.

    Logged as ``val/...`` and ``test/...``: ``acc_clean``, ``acc_<attack>``, ``acc_worst`` (right in all of them),
    ``worst_class_...``, and what each attack cost; ``loss`` is the clean cross-entropy.

    Args:
        num_classes: number of classes; None asks the module, then the data module.
        output_dir: folder of the store that keeps the outcome of every sample of test and predict, see
            :mod:`robust_pl.callbacks.store.store`; None keeps none. Where it holds the beginning of the same evaluation, that
            goes on.
        save_adversarial: keep the adversarial images, too, without which the evaluation cannot be audited.
    """

    request: dict[str, Any] | None = None
    """All that determines the result, as the command line knows it; None takes the attacks' own settings."""
    notes: dict[str, Any] | None = None
    """What the store should say of where the evaluation comes from."""

    def __init__(self, num_classes: int | None = None, output_dir: str | None = None, save_adversarial: bool = True) -> None:
        self.num_classes, self.output_dir, self.save_adversarial = num_classes, output_dir, save_adversarial
        self.rows: list[Row] = []
        self.last: tuple[Tensor, Outcome] | None = None
        self._attacks: dict[str, EvaluationAttack] = {}
        self._board: Scoreboard | None = None
        self._store: Store | None = None
        self._finished: frozenset[int] = frozenset()
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

    @property
    def finished(self) -> frozenset[int]:
        """First samples of the batches that an earlier, interrupted evaluation finished, and that this one leaves out."""
        return self._finished

    def _open_store(self, trainer: Trainer, stage: str) -> None:
        """Before the data are read, so that finished batches are not."""
        self._store, self._finished = None, frozenset()
        if not self.output_dir or stage not in ("test", "predict"):
            return
        # Processes that a cluster started do not know of each other's folders.
        folder = Path(trainer.strategy.broadcast(self.output_dir))
        request = self.request or {
            "precision": str(trainer.precision),
            "attacks": {name: describe(a) for name, a in self._named_attacks(trainer, stage).items()},
        }

        def open_it() -> list[int]:
            self._store = Store(folder, request, self.notes, images=self.save_adversarial, writer=trainer.is_global_zero)
            return self._store.finished()

        self._finished = frozenset(_on_first(trainer, open_it))
        if self._store is None:
            open_it()
        if self._finished and hasattr(trainer.datamodule, "leave_out"):
            limit = "limit_test_batches" if stage == "test" else "limit_predict_batches"
            trainer.datamodule.leave_out(self._finished, getattr(trainer, limit))
            setattr(trainer, limit, 1.0)  # of what is left

    def _named_attacks(self, trainer: Trainer, stage: str) -> dict[str, EvaluationAttack]:
        attacks = [c for c in trainer.callbacks if isinstance(c, EvaluationAttack) and stage in c.stages]
        names = [attack.name or type(attack).__name__.lower() for attack in attacks]
        check_names(names)
        return dict(zip(names, attacks, strict=True))

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._attacks = self._named_attacks(trainer, stage)
        classes = self.num_classes or getattr(pl_module, "num_classes", None)
        classes = classes or getattr(trainer.datamodule, "num_classes", None)
        if classes is None:
            raise ValueError(
                "num_classes is unknown: give the module num_classes, or the trainer RobustEvaluation(num_classes)"
            )
        self._seen = 0
        self._board = Scoreboard(list(self._attacks), classes).to(pl_module.device)
        if self._store is not None:
            _on_first(trainer, lambda: self._go_on(pl_module, facts_about(pl_module, self._attacks, trainer.datamodule)))
        self._fit_attacks(trainer, pl_module, stage)

    def _go_on(self, pl_module: LightningModule, facts: dict[str, Any]) -> None:
        self._store.identify(**facts)
        for columns, meta in self._store.columns():
            replay(self._board, columns, meta["seconds"], pl_module.device)

    def _fit_attacks(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, attack in self._attacks.items():
            if not attack.must_fit or attack.fitted:
                continue
            if self._store is not None and self._store.recall_fitted(name, attack):
                attack.fitted = True
                continue
            if trainer.datamodule is None:
                raise ValueError(f"the attack {name!r} must see training data first: give the trainer a data module")
            if trainer.world_size > 1:
                raise ValueError(f"the attack {name!r} must see all training data first: evaluate it in one process")
            trainer.datamodule.setup("fit")
            attack.fit_to(pl_module, trainer.datamodule.train_dataloader())
            attack.fitted = stage != "validate"  # in validation the network goes on changing
            if self._store is not None:
                self._store.remember_fitted(name, attack)

    def _batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        x, y, index = batch[0], batch[1], _index(trainer, batch, self._seen)
        self._seen += len(x)
        store, first = self._store, int(index.min()) if self._store is not None else 0
        if first in self._finished:  # a user's own loader knows of none
            store.read(first, x, y)
            return
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None

        def follow(name: str) -> Keeper:
            # In validation the bars are those of training.
            watch = partial(watch_attack, trainer, name) if trainer.testing or trainer.predicting else None
            return Keeper(watch) if store is None else store.follow(first, name, watch)

        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            outcome = attack_batch(pl_module, self._attacks, x, y, index, logits, follow)
        self.last = (x, outcome)
        score(self._board, outcome)
        if store is not None:
            store.add(x, outcome)

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
        if self._store is not None:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                path = self._store.finish(as_metrics(self.rows))
                self._store.close()
                Console(soft_wrap=True).print(f"Outcome of every sample: {os.path.relpath(path)}")
            self._store = None

    def _report(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero and self.rows:
            console = Console()
            console.print(as_table(self.rows, stage))
            if not self._attacks:
                console.print("No attacks were given: only clean accuracy was measured.")

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._open_store(trainer, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is not None:
            self._store.close()

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


def _on_first(trainer: Trainer, do: Callable[[], Any]) -> Any:
    """What the first process gets from ``do``; where it fails, all fail with its sentence and none waits for it."""
    result, failure = None, None
    if trainer.is_global_zero:
        try:
            result = do()
        except (ValueError, OSError) as error:
            if trainer.world_size == 1:
                raise
            failure = error
    result, said = trainer.strategy.broadcast((result, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if said is not None:
        raise ValueError(said)
    return result


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
