"""The rows of all comparisons: one for each network that a run tested, with what befell it on each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..summary import CLEAN, WORST
from ..units import radius
from .run import Run, Tested, short

_INCIDENTAL = ("seconds", "seed", "name")


@dataclass(frozen=True)
class Contender:
    """A network of a run: its raw or averaged weights, from one of its checkpoints.

    Args:
        label: of the run, and what tells it from other networks of that.
        suffix: the latter alone.
        run: it belongs to.
        number: of the run, from 0, which chooses its colour.
        tests: its evaluations.
        runs: those that hold them.
    """

    label: str
    suffix: str
    run: Run
    number: int
    tests: list[Tested]
    runs: list[Run]

    def is_of(self, network: str, weights: str) -> bool:
        """Whether these weights are its own."""
        return (self.tests[0].network, self.tests[0].weights) == (network, weights)

    def on(self, data: str) -> list[Tested]:
        """Its evaluations on a data set that saw the same samples as the first of them."""
        found = [test for test in self.tests if test.data == data]
        index = [test.table.columns["index"] for test in found]
        return [test for test, seen in zip(found, index, strict=True) if np.array_equal(seen, index[0])]


@dataclass(frozen=True)
class Verdicts:
    """Columns of a comparison on one data set.

    Args:
        columns: in order: clean, attacks, and the worst case over them.
        right: for each contender that was tested there, column -> whether each sample is right.
        threats: column of an attack -> what is known of it.
    """

    columns: list[str]
    right: list[tuple[Contender, dict[str, np.ndarray]]]
    threats: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def contenders(runs: Sequence[Run]) -> list[Contender]:
    """The networks of all runs, in order; a run without evaluations has none.

    Runs that trained nothing, and tested what an earlier run of the page tested, belong to that: so each test set may have been
    measured by a command of its own.
    """
    found: list[Contender] = []
    for number, run in enumerate(runs):
        groups: dict[tuple[str, str], list[Tested]] = {}
        for test in run.tests:
            groups.setdefault((test.network, test.weights), []).append(test)
        checkpoints = {network for network, _ in groups}
        suffixes: list[str] = []
        for (network, weights), tests in groups.items():
            same = [row for row in found if network and not row.run.trained and row.is_of(network, weights)]
            if same and not run.trained:
                same[0].tests.extend(tests)
                same[0].runs.append(run)
                continue
            of_checkpoint = (tests[0].checkpoint or tests[0].folder) if len(checkpoints) > 1 else ""
            suffix = " · ".join(part for part in (of_checkpoint, weights) if part)
            suffix = f"{suffix} ({tests[0].folder})" if suffix in suffixes else suffix
            suffixes.append(suffix)
            label = " · ".join(filter(None, (run.label, suffix)))
            found.append(Contender(label, suffix, run, number, list(tests), [run]))
    return found


def data_sets(rows: Sequence[Contender]) -> list[str]:
    """All data sets that something was tested on, those of trainings first."""
    names = dict.fromkeys([row.run.trained_on for row in rows] + [test.data for row in rows for test in row.tests])
    tested = {test.data for row in rows for test in row.tests}
    return [name for name in names if name in tested]


def verdicts(rows: Sequence[Contender], data: str) -> Verdicts:
    """What befell every network on a data set. Attacks of one name whose settings differ get columns of their own."""
    variants: dict[str, list[dict[str, Any]]] = {}
    there = [(row, tests) for row in rows if (tests := row.on(data))]
    for _, tests in there:
        for test in tests:
            for attack in test.table.attacks:
                threat = _threat(test, attack)
                if threat not in variants.setdefault(attack, []):
                    variants[attack].append(threat)
    named = {name: _names(name, threats) for name, threats in variants.items()}
    columns = [CLEAN, *(column for name in variants for column in named[name])]
    if len(columns) > 1:
        columns.append(WORST)
    right = []
    for row, tests in there:
        found = {CLEAN: tests[0].table.right()}
        for test in tests:
            for attack in test.table.attacks:
                column = named[attack][variants[attack].index(_threat(test, attack))]
                found.setdefault(column, test.table.right(attack))
        if len(found) > 1:
            found[WORST] = np.logical_and.reduce(list(found.values()))
        right.append((row, found))
    threats = {column: variants[name][k] for name in variants for k, column in enumerate(named[name])}
    return Verdicts(columns, right, threats)


def _threat(test: Tested, attack: str) -> dict[str, Any]:
    return {key: value for key, value in test.table.about(attack).items() if key not in _INCIDENTAL}


def _names(name: str, threats: list[dict[str, Any]]) -> list[str]:
    """The name, and where there are several threats of it also that in which they differ."""
    keys = dict.fromkeys(key for threat in threats for key in threat)
    differ = [key for key in keys if len({str(threat.get(key)) for threat in threats}) > 1]
    return [f"{name} ({', '.join(f'{key}={_said(key, threat)}' for key in differ)})" if differ else name for threat in threats]


def _said(key: str, threat: Mapping[str, Any]) -> str:
    value = threat.get(key)
    if key == "class":
        return short(value)
    return radius(value, threat.get("norm")) if key == "eps" else str(value)
