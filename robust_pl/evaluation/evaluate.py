"""Robust accuracy without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..callbacks.attacks.base import Attack
from ..callbacks.attacks.prepare import evaluating
from ..callbacks.gates import refuse_cut_gates
from ..callbacks.outcome import Keeper, attack_batch, check_index, check_names, score
from ..callbacks.progress import AttackBar
from ..callbacks.store.identity import describe, facts_about, replay
from ..callbacks.store.store import Store
from ..metrics.scoreboard import Row, Scoreboard, as_metrics, as_table, by_class
from ..nets.grouped import grouped

Data = LightningDataModule | Iterable[Any] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` measured; ``print`` it for a table."""

    rows: list[Row]

    @property
    def metrics(self) -> dict[str, float]:
        """Figures as ``robust-pl test`` logs them, without its prefix: ``acc_clean``, ``worst_class_<attack>``, ...

        Those of single classes are in ``rows``: ``class_accuracy``.
        """
        return as_metrics(self.rows)

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(as_table(self.rows, "evaluation"))
        return capture.get()


def evaluate(
    model: nn.Module,
    data: Data,
    attacks: Mapping[str, Attack] | None = None,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    progress: bool = False,
    store: str | Path | None = None,
) -> Report:
    """Accuracy of a classifier on clean samples, under each attack, and under the worst of them per sample.

    The same figures as ``robust-pl test``: random numbers belong to samples, so batches and devices do not matter.
    Cost: one forward pass, and for each attack its own passes and one more to judge it.

    Args:
        model: maps pixels in [0, 1] (B, C, H, W) to logits (B, K); evaluated in eval mode and left as it was.
        data: a data module (its test set, on its groups of classes where it has them), a loader of (x, y) or (x, y, index), or
            tensors (x, y).
        attacks: by name.
        batch_size: samples a batch where ``data`` are tensors.
        limit: only the first so many samples.
        progress: show a progress bar.
        store: folder that keeps the outcome of every sample, see :mod:`robust_pl.callbacks.store.store`. Where it holds the
            beginning of the same evaluation, that goes on.

    Raises:
        ValueError: if a name is taken twice or by the report itself, there is no sample, an attack refuses its input, the
            store holds another evaluation, or the gates of a dynamic network are cut off from gradients.
    """
    attacks = dict(attacks or {})
    check_names(list(attacks))
    kept = None
    if store is not None:
        request = {"attacks": {k: describe(v) for k, v in attacks.items()}, "batch_size": batch_size, "limit": limit}
        kept = Store(Path(store), request)
    try:
        with evaluating(model), grouped(model, getattr(data, "class_groups", None)):
            if kept is not None:
                kept.identify(**facts_about(model, attacks))
            _fit(attacks, model, data, kept)
            board = _evaluate(model, _limited(_batches(data, batch_size), limit), attacks, kept, progress)
        if board is None:
            raise ValueError("there is nothing to evaluate: the data hold no sample")
        report = Report(board.rows())
        if kept is not None:
            kept.finish(report.metrics | by_class(report.rows))
    finally:
        if kept is not None:
            kept.close()
    return report


def _fit(attacks: Mapping[str, Attack], model: nn.Module, data: Data, store: Store | None) -> None:
    for name, attack in attacks.items():
        if not attack.must_fit or attack.fitted or (store is not None and store.recall_fitted(name, attack)):
            continue
        if not isinstance(data, LightningDataModule):
            raise ValueError(f"the attack {name!r} must see training data first: pass a data module")
        data.prepare_data()
        data.setup("fit")
        attack.fit_to(model, data.train_dataloader())
        if store is not None:
            store.remember_fitted(name, attack)


def _evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    store: Store | None,
    progress: bool,
) -> Scoreboard | None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    bar = AttackBar()
    board: Scoreboard | None = None
    finished: frozenset[int] = frozenset()
    if store is not None:
        finished = frozenset(store.finished())
    with Progress(*Progress.get_default_columns(), disable=not progress) as display:
        for x, y, index in display.track(batches, description="evaluating"):
            first = int(index.min())
            if store is not None and first in finished:
                columns, meta = store.read(first, x, y)
                board = board or Scoreboard(list(attacks), meta["classes"]).to(device)
                replay(board, columns, meta["seconds"], device)
                continue

            if board is None and attacks:
                refuse_cut_gates(model, x.to(device))

            def follow(name: str, first: int = first) -> Keeper:
                watch = partial(bar.show, display, name) if progress else None
                return Keeper(watch) if store is None else store.follow(first, name, watch)

            outcome = attack_batch(model, attacks, x.to(device), y.to(device), index, follow=follow)
            board = board or Scoreboard(list(attacks), outcome.logits.shape[1]).to(device)
            score(board, outcome)
            if store is not None:
                store.add(x, outcome)
    return board


def _batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("test")
        loader: Any = data.test_dataloader()
    elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        loader = zip(data[0].split(batch_size), data[1].split(batch_size), strict=True)
    else:
        loader = data
    seen = 0
    for batch in loader:
        x, y = batch[0], batch[1]
        index = check_index(batch[2], len(x)) if len(batch) > 2 else torch.arange(seen, seen + len(x))
        seen += len(x)
        yield x, y, index


def _limited(batches: Iterator[tuple[Tensor, Tensor, Tensor]], limit: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    left = limit
    for x, y, index in batches:
        if left is None:
            yield x, y, index
        elif left > 0:
            yield x[:left], y[:left], index[:left]
            left -= len(x[:left])
        if left == 0:
            return
