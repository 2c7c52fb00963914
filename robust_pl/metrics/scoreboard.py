"""One row a verdict: clean, each attack, and the worst case over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..functional import fairness
from .accuracy import ClassAccuracy
from .cost import AttackCost

CLEAN, WORST = "clean", "worst"
HIGHER_IS_BETTER = ("acc", "worst_class", "worst_tenth", "fair")
"""Kinds of figures by which a network may be chosen: ``acc_clean``, ``fair_pgd``, ..."""


@dataclass(frozen=True)
class Row:
    """One line of a report: accuracies in [0, 1], passes per sample, seconds; costs are None where nothing was spent.

    Args:
        name: ``clean``, ``worst``, or that of an attack.
        right: right verdicts of each class (K,).
        total: samples of each class (K,); a class without one is left out of all figures.
        forwards: forward passes per sample.
        backwards: backward passes per sample.
        seconds: for all samples.
    """

    name: str
    right: tuple[int, ...]
    total: tuple[int, ...]
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.total)

    @property
    def accuracy(self) -> float:
        """Share of all samples; nan if there is none, as are the figures below."""
        return sum(self.right) / self.samples if self.samples else math.nan

    @property
    def class_accuracy(self) -> dict[int, float]:
        """Class -> accuracy, of those that occur."""
        return {k: right / total for k, (right, total) in enumerate(zip(self.right, self.total, strict=True)) if total}

    @property
    def worst_class(self) -> float:
        """Accuracy of the worst class."""
        return fairness.worst_class(self._by_class()).item() if self.samples else math.nan

    @property
    def worst_tenth(self) -> float:
        """Mean accuracy of the worst tenth of the classes, rounded up."""
        return fairness.worst_tenth(self._by_class()).item() if self.samples else math.nan

    @property
    def nsd(self) -> float:
        """Population standard deviation of the class accuracies over their mean; nan where no sample is right."""
        return fairness.nsd(self._by_class()).item() if self.samples else math.nan

    @property
    def fair(self) -> float:
        """Accuracy plus that of the worst class, in [0, 2]: a checkpoint with more of it is both good and fair."""
        return self.accuracy + self.worst_class

    def _by_class(self) -> Tensor:
        return torch.tensor(list(self.class_accuracy.values()), dtype=torch.float64)


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
            right, total = metric.compute().tolist()
            spent = self.cost[f"cost_{name}"].compute().tolist() if name in self.attacks else ()
            rows.append(Row(name, tuple(right), tuple(total), *spent))
        return rows


def as_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Flat figures of a report: of each row accuracy and fairness, and what each attack cost.

    ``acc_<name>``, ``worst_class_<name>``, ``worst_tenth_<name>``, ``fair_<name>``, ``nsd_<name>`` (left out where no sample is
    right, for it is 0 / 0 then), ``forwards_<name>``, ``backwards_<name>``, ``seconds_<name>``.
    """
    figures: dict[str, float] = {}
    for row in rows:
        figures[f"acc_{row.name}"] = row.accuracy
        figures[f"worst_class_{row.name}"] = row.worst_class
        figures[f"worst_tenth_{row.name}"] = row.worst_tenth
        figures[f"fair_{row.name}"] = row.fair
        if not math.isnan(row.nsd):
            figures[f"nsd_{row.name}"] = row.nsd
        if row.forwards is not None:
            figures[f"forwards_{row.name}"] = row.forwards
            figures[f"backwards_{row.name}"] = row.backwards
            figures[f"seconds_{row.name}"] = row.seconds
    return figures


def best_of(*reports: Sequence[Row]) -> dict[str, float]:
    """The higher one of each figure over several networks, of those that are better the higher."""
    figures = [as_metrics(rows) for rows in reports]
    kinds = tuple(f"{kind}_" for kind in HIGHER_IS_BETTER)
    return {key: max(one[key] for one in figures) for key in figures[0] if key.startswith(kinds)}


def by_class(rows: Sequence[Row], class_names: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracy of each class that occurs: ``class_acc_<name>/<class>``.

    Args:
        rows: of the report.
        class_names: None, or names that do not tell each class from the others, take the classes' numbers.
    """
    names = [str(name) for name in class_names or ()]
    known = all(len(row.total) == len(names) for row in rows) and len(set(names)) == len(names)
    return {
        f"class_acc_{row.name}/{names[k] if known else k}": accuracy
        for row in rows
        for k, accuracy in row.class_accuracy.items()
    }


def as_table(rows: Sequence[Row], title: str) -> Table:
    """The report as people read it."""
    title = f"{title}: {rows[0].samples} samples; forward and backward passes per sample"
    table = Table(title=title, title_justify="left")
    table.add_column("attack")
    many = len(rows[0].class_accuracy) > 10
    for heading in ("accuracy", "worst class", *(["worst tenth"] if many else []), "NSD", "forward", "backward", "seconds"):
        table.add_column(heading, justify="right")
    labels = {CLEAN: "none (clean)", WORST: "worst of all"}
    for row in rows:
        tenth = [f"{row.worst_tenth:.2%}"] if many else []
        spread = "" if math.isnan(row.nsd) else f"{row.nsd:.3f}"
        spent = [f"{n:.2f}" if n is not None else "" for n in (row.forwards, row.backwards, row.seconds)]
        name = labels.get(row.name, row.name)
        table.add_row(name, f"{row.accuracy:.2%}", f"{row.worst_class:.2%}", *tenth, spread, *spent)
    return table
