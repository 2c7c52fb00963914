"""The section on natural shifts: networks on other data sets than that of their training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...metrics.effective_robustness import SHIFTS, Baseline, ShiftRow, standard_baseline
from .accuracy import name_cell, with_best
from .blocks import Cell, Grid, Section, Text, per_cent
from .contenders import Contender, contenders, data_sets
from .run import Run, Tested, name_of_data, settings_of

_SUBSET, _WHOLE = "ImageNetSubset", "ImageNet"
_OWN = ("ImageNetE", "ImageNetV", "CueConflict")
"""Sets of images that were made of others: ImageNet's validation set, all of it, is not what they were made of."""
_KNOWN = {shift.replace("_", ""): shift for shift in SHIFTS}


def shift_sections(runs: Sequence[Run], baselines: Mapping[str, Baseline] | None = None) -> list[Section]:
    """One section, if a network was tested on another data set than that of its training.

    Args:
        runs: to compare.
        baselines: data set -> accuracies that are to be expected; beside those that are known of ImageNet's.
    """
    names = data_sets(contenders(runs))
    rows = [(row, found) for row in contenders(runs) for found in shift_rows_of(row, names, baselines or {})]
    if not rows:
        return []
    lines = []
    for row, found in rows:
        drop = None if math.isnan(found.acc_id) else found.drop
        shares = (found.acc_id, found.acc_ood, drop, found.expected, found.effective)
        lines.append([name_cell(row), Cell(found.shift), *map(per_cent, shares)])
    headings = ["network", "data set", "without shift", "with shift", "drop", "expected", "effective robustness"]
    blocks: list[Any] = [Grid("Natural shifts, accuracies in %", headings, with_best(lines, [6]))]
    if any(found.expected is not None for _, found in rows):
        blocks.append(
            Text(
                "Expected: accuracy under the shift of standard networks that are as accurate without it, by a line between "
                "logits (arXiv 2007.00644). Effective robustness is what a network has above it."
            )
        )
    if any(math.isnan(found.acc_id) for _, found in rows):
        blocks.append(
            Text(
                "No accuracy without the shift: it has to be measured on the same classes, with ImageNetSubsetDataModule and "
                "classes such as imagenet_a. Of ImageNet-E report the tests alone, that of the original images first."
            )
        )
    return [Section("Natural shifts", blocks)]


def shift_rows_of(row: Contender, names: Sequence[str], baselines: Mapping[str, Baseline]) -> list[ShiftRow]:
    """What a network does on each other data set; ``acc_id`` is NaN where it was not measured on the classes of the shift."""
    home = row.run.trained_on
    found = []
    for name in names:
        tests = row.on(name)
        kind = _kind(tests[0]) if tests else ""
        if not tests or name == home or kind == _SUBSET:
            continue
        shift = _KNOWN.get(kind.lower())
        acc_id = _without(row, kind, SHIFTS.get(shift or "", ""), home)
        baseline = baselines.get(name) or (standard_baseline(shift) if shift else None)
        expected = None if baseline is None or math.isnan(acc_id) else baseline.expected(acc_id)
        found.append(ShiftRow(name, acc_id, _clean(tests[0]), expected))
    return found


def _without(row: Contender, kind: str, base: str, home: str) -> float:
    """Accuracy without the shift: on the data of the training, or for ImageNet's on ImageNet, all of it or the same classes."""
    homes = {_kind(test) for test in row.tests if test.data == home}
    if kind in _OWN and kind not in homes:
        return math.nan
    for test in row.tests:
        asked = settings_of(test.table.meta.get("config", {}).get("data"))
        part = f"imagenet_on_{str(asked.get('classes')).removeprefix('imagenet_')}"
        fits = {"": test.data == home, "imagenet": _kind(test) == _WHOLE}.get(base, _kind(test) == _SUBSET and part == base)
        if fits:
            return _clean(test)
    return math.nan


def _kind(test: Tested) -> str:
    return name_of_data(test.table.meta.get("config", {}).get("data")) or test.data


def _clean(test: Tested) -> float:
    return float(test.table.right().mean())
