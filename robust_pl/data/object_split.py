"""Whole objects held out for validation and test, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import ValSplit
from .hashing import SPLIT, permutation

_TEST_SEED = 0
Share = int | float


def check_share(name: str, share: Share | str) -> None:
    """Refuse what is neither a fraction nor a number of objects.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(share, str) or share < 0 or (isinstance(share, float) and share >= 1):
        raise ValueError(f"{name}={share} must be a fraction in [0, 1) or a whole number of objects of each class")


def split_objects(
    groups: Mapping[str, Sequence[str]], val_objects: Share, test_objects: Share, held_out: ValSplit, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Names of the objects of training, validation and test, class by class and sorted within.

    Args:
        groups: names of the objects of each class.
        val_objects: of each class, as a fraction or a number.
        test_objects: likewise.
        held_out: ``random`` ones, of the test the same for every seed; or the ``last`` by name, the test's behind the
            validation's.
        seed: of the validation's.

    Raises:
        ValueError: if a class keeps none to train on.
    """
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for place, (kind, names) in enumerate(groups.items()):
        names = sorted(names)
        val, test = (n if isinstance(n, int) else round(n * len(names)) for n in (val_objects, test_objects))
        kept = len(names) - val - test
        if kept < 1:
            raise ValueError(
                f"class {kind!r} has {len(names)} objects, of which val_objects={val_objects} and test_objects={test_objects} "
                "leave none to train on: lower them"
            )
        if held_out == "random":
            names = [names[i] for i in permutation(len(names), _TEST_SEED, SPLIT, place).tolist()]
            rest = names[: kept + val]
            names[: len(rest)] = [rest[i] for i in permutation(len(rest), seed, SPLIT, place, 1).tolist()]
        for part, some in zip(parts, (names[:kept], names[kept : kept + val], names[kept + val :]), strict=True):
            part += sorted(some)
    return parts
