"""The evaluation of one set of weights: its attacks, its counts and its store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from ..metrics.scoreboard import CLEAN, WORST, Row, Scoreboard, as_metrics, as_table, by_class
from ..nets.averages import Average
from .outcome import EvaluationAttack, Keeper, Outcome, attack_batch, score
from .progress import watch_attack
from .store.identity import describe, facts_about, replay
from .store.store import Store

_PREFIX = {"validate": "val", "test": "test", "predict": "predict"}
_TITLE = {"validate": "validation"}


class Track:
    """One set of weights on its way through a data set.

    Args:
        average: the weights; None takes the module's own.
    """

    def __init__(self, average: Average | None = None) -> None:
        self.average = average
        self.rows: list[Row] = []
        self.last: tuple[Tensor, Outcome] | None = None
        self.finished: frozenset[int] = frozenset()
        self.folder: Path | None = None
        self.attacks: dict[str, EvaluationAttack] = {}
        self.fitted: set[str] = set()
        self._board: Scoreboard | None = None
        self._store: Store | None = None

    def again(self) -> Track:
        """The same weights on another way; which attacks were fitted to them is remembered."""
        track = Track(self.average)
        track.rows, track.last, track.fitted = self.rows, self.last, self.fitted
        return track

    def applied(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """While this lasts, the module has these weights."""
        return nullcontext() if self.average is None else self.average.applied(pl_module)

    def title(self, stage: str) -> str:
        """What its table is called."""
        return _TITLE.get(stage, stage) + ("" if self.average is None else f" of {self.average.name}")

    def prefix(self, stage: str) -> str:
        """What its figures' names begin with."""
        return _PREFIX[stage] if self.average is None else f"{_PREFIX[stage]}_{self.average.name}"

    # The store -------------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it has a store."""
        return self._store is not None

    def open(
        self,
        trainer: Trainer,
        folder: Path,
        request: Mapping[str, Any] | None,
        notes: Mapping[str, Any] | None,
        attacks: Mapping[str, EvaluationAttack],
        images: bool,
    ) -> None:
        """Begin or go on with a store: that of an average in ``<folder>-<name>``, whose request says which weights it is of."""
        request = request or {
            "precision": str(trainer.precision),
            "attacks": {name: describe(attack) for name, attack in attacks.items()},
        }
        if self.average is not None:
            folder, request = folder.with_name(f"{folder.name}-{self.average.name}"), {**request, "weights": self.average.name}
            if notes and "name" in notes:
                notes = {**notes, "name": f"{notes['name']}#{self.average.name}"}
        self.folder = folder

        def open_it() -> list[int]:
            self._store = Store(folder, request, notes, images=images, writer=trainer.is_global_zero)
            return self._store.finished()

        self.finished = frozenset(on_first(trainer, open_it))
        if self._store is None:
            open_it()

    def close(self) -> None:
        """Let others write to the store."""
        if self._store is not None:
            self._store.close()

    # One pass --------------------------------------------------------------------------------------------------------

    def start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
        attacks: Mapping[str, EvaluationAttack],
        classes: int,
    ) -> None:
        """Before the first batch."""
        self.attacks = dict(attacks)
        if self.average is not None:  # a checkpoint's is on the CPU
            weights = {name: tensor.to(pl_module.device) for name, tensor in self.average.weights.items()}
            self.average = Average(self.average.name, weights)
        self._board = Scoreboard(list(attacks), classes).to(pl_module.device)
        with self.applied(pl_module):
            if self._store is not None:
                on_first(trainer, lambda: self._go_on(pl_module, facts_about(pl_module, self.attacks, trainer.datamodule)))
            self._fit_attacks(trainer, pl_module, stage)

    def batch(
        self, trainer: Trainer, pl_module: LightningModule, x: Tensor, y: Tensor, index: Tensor, logits: Tensor | None
    ) -> None:
        """Attack and judge one batch; ``logits`` are those of the clean images, if they are known."""
        store, first = self._store, int(index.min()) if self._store is not None else 0
        if store is not None and first in self.finished:  # a user's own loader knows of none
            store.read(first, x, y)
            return

        def follow(name: str) -> Keeper:
            # In validation the bars are those of training.
            shown = name if self.average is None else f"{name} on {self.average.name}"
            watch = partial(watch_attack, trainer, shown) if trainer.testing or trainer.predicting else None
            return Keeper(watch) if store is None else store.follow(first, name, watch)

        with self.applied(pl_module), trainer.precision_plugin.val_step_context(), torch.no_grad():
            outcome = attack_batch(pl_module, self.attacks, x, y, index, logits, follow)
        self.last = (x, outcome)
        score(self._board, outcome)
        if store is not None:
            store.add(x, outcome)

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the last batch: log the figures, seal the store. With several processes all must call it."""
        self.rows = self._board.rows()
        prefix = self.prefix(stage)
        if stage != "predict":
            shown = {f"acc_{CLEAN}", f"acc_{WORST}"} if stage == "validate" and self.average is None else set()
            figures = {"loss": self._board.loss.compute().item(), **as_metrics(self.rows)}
            log_rows(pl_module, prefix, figures, shown)
        if self._store is not None:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                path = self._store.finish(as_metrics(self.rows) | by_class(self.rows))
                self._store.close()
                Console(soft_wrap=True).print(f"Outcome of every sample: {os.path.relpath(path)}")
            self._store = None

    def report(self, stage: str) -> None:
        """Print the table."""
        Console().print(as_table(self.rows, self.title(stage)))

    def log_classes(self, trainer: Trainer, stage: str) -> None:
        """Give the loggers the accuracy of each class. Past Lightning, which would print hundreds of lines."""
        names = getattr(trainer.datamodule, "class_names", None)
        figures = {f"{self.prefix(stage)}/{key}": value for key, value in by_class(self.rows, names).items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
            logger.save()

    def _go_on(self, pl_module: LightningModule, facts: dict[str, Any]) -> None:
        self._store.identify(**facts)
        for columns, meta in self._store.columns():
            replay(self._board, columns, meta["seconds"], pl_module.device)

    def _fit_attacks(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, attack in self.attacks.items():
            if not attack.must_fit or attack.fitted:
                continue
            if self._store is not None and self._store.recall_fitted(name, attack):
                attack.fitted = True
                self.fitted.add(name)
                continue
            if trainer.datamodule is None:
                raise ValueError(f"the attack {name!r} must see training data first: give the trainer a data module")
            if trainer.world_size > 1:
                raise ValueError(f"the attack {name!r} must see all training data first: evaluate it in one process")
            trainer.datamodule.setup("fit")
            attack.fit_to(pl_module, trainer.datamodule.train_dataloader())
            attack.fitted = stage != "validate"  # in validation the network goes on changing
            self.fitted.add(name)
            if self._store is not None:
                self._store.remember_fitted(name, attack)


def twins(attacks: Mapping[str, EvaluationAttack], fitted_here: set[str]) -> dict[str, EvaluationAttack]:
    """The attacks for another set of weights: what learns from a network learns from each anew.

    Args:
        attacks: of the first set of weights.
        fitted_here: those that were fitted to it; where a user fitted one, that counts for every set.
    """
    found = dict(attacks)
    for name, attack in attacks.items():
        if attack.must_fit:
            found[name] = copy(attack)
            found[name].fitted = attack.fitted and name not in fitted_here
    return found


def log_rows(pl_module: LightningModule, prefix: str, figures: Mapping[str, float], shown: Collection[str] = ()) -> None:
    """Log figures that are already those of all processes, so that nothing is left to synchronise.

    Args:
        pl_module: that logs them.
        prefix: of their names.
        figures: by name.
        shown: those that the progress bar shows.
    """
    warnings.filterwarnings("ignore", message=f"It is recommended to use `self.log.'{prefix}/.*sync_dist=True")
    for key, value in figures.items():
        pl_module.log(f"{prefix}/{key}", value, prog_bar=key in shown)


def on_first(trainer: Trainer, do: Callable[[], Any]) -> Any:
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
