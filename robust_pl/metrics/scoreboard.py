"""One row a verdict: clean, each attack, and the worst case over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn
from torchmetrics import MeanMetric

from .accuracy import ClassAccuracy
from .cost import AttackCost

CLEAN, WORST = "clean", "worst"


@dataclass(frozen=True)
class Row:
    """One line of a report: accuracies in [0, 1], passes per sample, seconds; costs are None where nothing was spent."""

    name: str
    accuracy: float
    worst_class: float
    samples: int
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None


class Scoreboard(nn.Module):
    """Counts verdicts of one pass over a data set. The worst case is taken per sample.

    Args:
        attacks: names of the attacks.
        num_classes: number of classes K.
    """

    def __init__(self, attacks: Sequence[str], num_classes: int) -> None:
        super().__init__()
        self.attacks = list(attacks)
        columns = [CLEAN, *self.attacks, WORST] if self.attacks else [CLEAN]
        # nn.ModuleDict refuses names such as "keys", so the names stay outside of it.
        self.accuracy = nn.ModuleDict({f"acc_{name}": ClassAccuracy(num_classes) for name in columns})
        self.cost = nn.ModuleDict({f"cost_{name}": AttackCost() for name in self.attacks})
        self.loss = MeanMetric()

    def update(self, y: Tensor, right: dict[str, Tensor], cost: dict[str, tuple[int, int, float]], loss: Tensor) -> None:
        """Add a batch.

        Args:
            y: classes (B,).
            right: verdict bool (B,) for ``clean`` and for each attack.
            cost: forward passes, backward passes (both summed over samples) and seconds of each attack.
            loss: clean cross-entropy of each sample (B,).
        """
        standing = right[CLEAN]
        self.accuracy["acc_" + CLEAN].update(standing, y)
        for name in self.attacks:
            self.accuracy[f"acc_{name}"].update(right[name], y)
            forwards, backwards, seconds = cost[name]
            self.cost[f"cost_{name}"].update(forwards, backwards, len(y), seconds)
            standing = standing & right[name]
        if self.attacks:
            self.accuracy["acc_" + WORST].update(standing, y)
        self.loss.update(loss)

    def reset(self) -> None:
        """Forget all batches."""
        for metric in (*self.accuracy.values(), *self.cost.values(), self.loss):
            metric.reset()

    def rows(self) -> list[Row]:
        """The report so far; with several processes all of them must call it."""
        rows = []
        for key, metric in self.accuracy.items():
            name = key.removeprefix("acc_")
            spent = self.cost[f"cost_{name}"].compute().tolist() if name in self.attacks else ()
            rows.append(Row(name, *metric.figures(), *spent))
        return rows


def as_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Flat figures of a report: ``acc_<name>``, ``worst_class_<name>``, and what each attack cost."""
    figures: dict[str, float] = {}
    for row in rows:
        figures[f"acc_{row.name}"] = row.accuracy
        figures[f"worst_class_{row.name}"] = row.worst_class
        if row.forwards is not None:
            figures[f"forwards_{row.name}"] = row.forwards
            figures[f"backwards_{row.name}"] = row.backwards
            figures[f"seconds_{row.name}"] = row.seconds
    return figures


def as_table(rows: Sequence[Row], title: str) -> Table:
    """The report as people read it."""
    title = f"{title}: {rows[0].samples} samples; forward and backward passes per sample"
    table = Table(title=title, title_justify="left")
    table.add_column("attack")
    for heading in ("accuracy", "worst class", "forward", "backward", "seconds"):
        table.add_column(heading, justify="right")
    labels = {CLEAN: "none (clean)", WORST: "worst of all"}
    for row in rows:
        spent = [f"{n:.2f}" if n is not None else "" for n in (row.forwards, row.backwards, row.seconds)]
        table.add_row(labels.get(row.name, row.name), f"{row.accuracy:.2%}", f"{row.worst_class:.2%}", *spent)
    return table
