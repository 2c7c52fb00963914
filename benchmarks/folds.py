"""Verdicts of folds over all digits, put together: every sample tested once a seed, by networks that never saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from robust_pl.data import DigitsDataModule

from .paired import Verdicts, by_class, over_samples
from .runs import markdown

SAYS = {"clean": "clean", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


def pooled(tests: Sequence[Verdicts], folds: int) -> Verdicts:
    """One table over all digits from those of the folds, seed after seed; a verdict is the share of seeds with a right one.

    Args:
        tests: of fold 0, 1, ... of the first seed, then of the next.
        folds: how many there are.

    Raises:
        ValueError: if a fold was tested on other digits than its own, each once, which all folds together are.
    """
    seeds, count = [tests[i : i + folds] for i in range(0, len(tests), folds)], sum(len(t.index) for t in tests[:folds])
    labels = np.full(count, -1)
    shares = {name: np.zeros(count) for name in tests[0].right}
    for of_seed in seeds:
        for fold, test in enumerate(of_seed):
            data = DigitsDataModule(fold=fold)
            if not np.array_equal(data.test_set.labels.numpy(), test.labels[np.argsort(test.index)]):
                raise ValueError(f"the test of fold {fold} was of other digits: delete the folds and run them again")
            positions = data.positions[1].numpy()[test.index]
            labels[positions] = test.labels
            for name, right in test.right.items():
                shares[name][positions] += right / len(seeds)
    return Verdicts(np.arange(count), labels, shares)


def report(ours: Verdicts, theirs: Verdicts, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Markdown and numbers of a paired comparison: each figure with its interval, and each class."""
    if not (ours.labels == theirs.labels).all():
        raise ValueError(f"{names[0]} and {names[1]} were tested on other digits: delete the folds and run them again")
    first, second = names
    body, classes, numbers = [], [], {}
    for name, right in ours.right.items():
        differences = over_samples(right, theirs.right[name], ours.labels)
        accuracy = 100 * by_class(np.stack([right, theirs.right[name]]), ours.labels)
        for figure, found in differences.items():
            digits = 3 if figure == "NSD" else 1
            both = [f"{value:.{digits}f}" for value in (found.ours, found.theirs)]
            body.append([f"{SAYS.get(name, name)}, {figure}", *both, found.text(digits)])
        for who, of_classes in zip(names, accuracy, strict=True):
            classes.append([f"{SAYS.get(name, name)}, {who}", *(f"{value:.1f}" for value in of_classes)])
        numbers[name] = {
            "classes": dict(zip(names, accuracy.tolist(), strict=True)),
            "figures": {figure: asdict(found) for figure, found in differences.items()},
        }
    text = markdown(["figure", first, second, "difference and 95 % interval"], body)
    text += "\n" + markdown(["class", *map(str, np.unique(ours.labels))], classes)
    return text, {"methods": list(names), "samples": len(ours.labels), "verdicts": numbers}
