"""What a run measured, as plain data: the one form that the page and the table for papers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..classes import Classes, count_classes
from ..record import Record
from ..summary import Line, summarise
from ..table import Table


@dataclass(frozen=True)
class Tested:
    """A finished evaluation.

    Args:
        folder: its name in the run, such as ``test``.
        data: the data set, in words.
        identity: tells one test set from another of the same name: a sum over its first images, and its size.
        weights: name of the average that was tested; empty for the raw weights.
        network: tells one network from another: a sum of the checkpoint, or of the weights.
        checkpoint: its file, in words; empty where there was none.
        table: outcomes, with ``attacks``, ``class_names``, ``flags``, ``hardware`` and ``config`` as far as they are known.
    """

    folder: str
    data: str
    identity: str
    weights: str
    network: str
    checkpoint: str
    table: Table

    @cached_property
    def lines(self) -> list[Line]:
        """Clean, attacks with their parts, and the worst case."""
        return summarise(self.table)

    @cached_property
    def classes(self) -> list[Classes]:
        """The same verdicts by class."""
        return count_classes(self.table)


@dataclass(frozen=True)
class Analysed:
    """What an analysis found.

    Args:
        folder: of the evaluation that it belongs to; empty where that is not known.
        data: the data set, in words.
        record: what it found.
        pictures: title -> bytes of a PNG.
    """

    folder: str
    data: str
    record: Record
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Viewed:
    """What a viewpoint attack found in a test.

    Args:
        name: of the attack.
        views: fresh views that were classified, over all objects.
        right: of those, how many the network got right.
        objects: how many there are.
        standing: of those, how many are right at their worst view.
        figures: others, by the names under which they are logged: ``entropy``, ``coverage``, ``renders``, ...
        settings: of the attack.
        pictures: title -> bytes of a PNG.
    """

    name: str
    views: int
    right: int
    objects: int
    standing: int
    figures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A figure over the training.

    Args:
        axis: ``epoch`` or ``step``.
        x: places on it, ascending.
        y: values.
    """

    axis: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Run:
    """All that is known of a run.

    Args:
        label: tells it from the others of the page.
        config: of the training, or of the first evaluation where nothing was trained.
        configs: name of a file -> its text.
        seed: of the run.
        versions: of packages.
        hardware: what it was trained on, in words.
        tests: finished evaluations, in the order of their folders.
        analyses: what analyses found.
        views: what viewpoint attacks found.
        cost: of the training, as :attr:`robust_pl.callbacks.ComputeMonitor.cost` has it.
        training: figure -> its course.
        gaps: sentences on what could not be read, or is not there.
        trained: whether it trained something, and did not only test it.
    """

    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    tests: list[Tested] = field(default_factory=list)
    analyses: list[Analysed] = field(default_factory=list)
    views: list[Viewed] = field(default_factory=list)
    cost: Mapping[str, Any] | None = None
    training: Mapping[str, Curve] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    trained: bool = True

    @property
    def trained_on(self) -> str:
        """Data set of the training, in words; of the first evaluation where nothing was trained."""
        return name_of_data(self.config.get("data")) or (self.tests[0].data if self.tests else "")

    @property
    def method(self) -> str:
        """Class of the method, and what it learns in."""
        model = as_map(self.config.get("model"))
        net = as_map(settings_of(model).get("net"))
        return " · ".join(short(part.get("class_path")) for part in (model, net) if part.get("class_path"))


def name_of_data(config: Any) -> str:
    """Name of the data set, also where another data module wraps it; empty where the config says nothing."""
    inner = settings_of(config).get("data")
    return (
        name_of_data(inner)
        if isinstance(inner, Mapping)
        else short(as_map(config).get("class_path")).removesuffix("DataModule")
    )


def settings_of(config: Any) -> Mapping[str, Any]:
    """Arguments of what a config describes."""
    return as_map(as_map(config).get("init_args"))


def as_map(value: Any) -> Mapping[str, Any]:
    """The value, or nothing where it is no map."""
    return value if isinstance(value, Mapping) else {}


def short(class_path: Any) -> str:
    """The class alone."""
    return str(class_path or "").rpartition(".")[2]
