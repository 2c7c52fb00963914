"""What accuracy under a shift is to be expected, from a file of the user."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from ..metrics.effective_robustness import Baseline, Pair

COLUMNS = ("data", "acc_id", "acc_ood")


def read_baselines(path: Path) -> dict[str, Baseline]:
    """A baseline for each data set, fitted to the accuracies of standard networks.

    Args:
        path: CSV with the columns ``data``, the data set as the report names it, and ``acc_id`` and ``acc_ood``, accuracies in
            [0, 1] without and with the shift; a row for each network and data set.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column or holds no accuracies from which a line can be fitted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name a CSV with the columns {', '.join(COLUMNS)}")
    pairs: dict[str, list[Pair]] = defaultdict(list)
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                data, acc_id, acc_ood = (row[column] for column in COLUMNS)
                pairs[data].append((float(acc_id), float(acc_ood)))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}, line {number}: give {', '.join(COLUMNS)}, the last two in [0, 1]") from None
    if not pairs:
        raise ValueError(f"{path} holds no networks: give a row for each network and data set")
    fitted = {}
    for data, found in pairs.items():
        try:
            fitted[data] = Baseline.fit(found)
        except ValueError as error:
            raise ValueError(f"{path}, {data}: {error}") from None
    return fitted
