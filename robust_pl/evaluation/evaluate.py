"""Robust accuracy without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..callbacks.attacks.base import Attack
from ..callbacks.attacks.prepare import evaluating
from ..callbacks.outcome import attack_batch, check_names, score
from ..metrics.scoreboard import Row, Scoreboard, as_metrics, as_table

Data = LightningDataModule | Iterable[Any] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` measured; ``print`` it for a table."""

    rows: list[Row]

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies and costs as ``robust-pl test`` logs them, without its prefix: ``acc_clean``, ``acc_<attack>``, ..."""
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
) -> Report:
    """Accuracy of a classifier on clean samples, under each attack, and under the worst of them per sample.

    The same figures as ``robust-pl test``: random numbers belong to samples, so batches and devices do not matter.
    Cost: one forward pass, and for each attack its own passes and one more to judge it.

    Args:
        model: maps pixels in [0, 1] (B, C, H, W) to logits (B, K); evaluated in eval mode and left as it was.
        data: a data module (its test set), a loader of (x, y) or (x, y, index), or tensors (x, y).
        attacks: by name.
        batch_size: samples a batch where ``data`` are tensors.
        limit: only the first so many samples.
        progress: show a progress bar.

    Raises:
        ValueError: if a name is taken twice or by the report itself, there is no sample, or an attack refuses its input.
    """
    attacks = dict(attacks or {})
    check_names(list(attacks))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    board: Scoreboard | None = None
    batches: Iterable[tuple[Tensor, Tensor, Tensor]] = _limited(_batches(data, batch_size), limit)
    if progress:
        batches = track(batches, description="evaluating")
    with evaluating(model):
        for name, attack in attacks.items():
            if attack.must_fit:
                if not isinstance(data, LightningDataModule):
                    raise ValueError(f"the attack {name!r} must see training data first: pass a data module")
                data.prepare_data()
                data.setup("fit")
                attack.fit_to(model, data.train_dataloader())
        for x, y, index in batches:
            outcome = attack_batch(model, attacks, x.to(device), y.to(device), index)
            if board is None:
                board = Scoreboard(list(attacks), outcome.logits.shape[1]).to(device)
            score(board, outcome)
    if board is None:
        raise ValueError("there is nothing to evaluate: the data hold no sample")
    return Report(board.rows())


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
        index = batch[2] if len(batch) > 2 else torch.arange(seen, seen + len(x))
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
