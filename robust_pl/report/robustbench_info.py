"""The entry of a leaderboard, as the files in RobustBench's ``model_info`` hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .table import Table
from .units import radius

FIELDS: tuple[str, ...] = (
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "autoattack_acc",
    "footnote",
    "unreliable",
)
_TEXTS = ("link", "name", "authors", "venue", "architecture", "reported")
_WHOLE_TEST_SET = 10_000


def model_info(table: Table, attack: str | None = None, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of RobustBench's ``model_info/<data set>/<threat model>/<name>.json`` (Croce et al. 2021, arXiv:2010.09670).

    What was measured is filled in; what only people know stays an empty text, or null where the field is no text.

    Args:
        table: outcomes.
        attack: the one whose accuracy is ``autoattack_acc``; None takes the only one of the class ``AutoAttack``, and
            leaves the field empty where there is none.
        known: fields to fill in, such as ``link``, ``name``, ``authors``, ``venue``, ``architecture``.

    Raises:
        ValueError: if ``known`` names something that is no such field, or there is no such attack.
    """
    known = dict(known or {})
    unknown = [name for name in known if name not in FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of a model info: there are {', '.join(FIELDS)}")
    attack = attack or _autoattack(table)
    info: dict[str, Any] = dict.fromkeys(FIELDS) | dict.fromkeys(_TEXTS, "")
    info |= {
        "dataset": str(table.meta.get("dataset", "")).lower(),
        "eps": "",
        "clean_acc": _per_cent(table.right().mean()),
        "autoattack_acc": "",
    }
    if attack is not None:
        about = table.about(attack)
        info["eps"] = radius(about.get("eps"), about.get("norm"))
        # Like RobustBench's, right before the attack and under it.
        info["autoattack_acc"] = _per_cent((table.right() & table.right(attack)).mean())
    if table.meta.get("flags"):
        info["unreliable"] = any(flag.get("raised") for flag in table.meta["flags"])
    if len(table) != _WHOLE_TEST_SET:
        info["footnote"] = f"Measured on {len(table)} samples."
    return info | known


def _autoattack(table: Table) -> str | None:
    found = [name for name in table.attacks if str(table.about(name).get("class", "")).rpartition(".")[2] == "AutoAttack"]
    return found[0] if len(found) == 1 else None


def _per_cent(share: float) -> str:
    return f"{100 * share:.2f}"
