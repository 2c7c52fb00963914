"""The outcome of every sample, and what it was measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """An evaluation as a report sees it.

    Args:
        columns: name -> one number a sample, as array or tensor (N,). ``index``, ``label``, ``prediction``, ``confidence`` of
            the clean image; for each attack ``prediction_<name>``, ``linf_<name>``, ``l2_<name>``, ``l1_<name>``,
            ``forwards_<name>``, ``backwards_<name>``, and for its parts ``robust_<name>_<part>``, whether the sample stands
            after the part. The order of the attacks is that of the columns.
        meta: ``model`` and ``dataset`` in words; ``class_names``; ``attacks``: name -> ``class``, ``norm``, ``eps``,
            ``seconds`` and further settings; ``flags``: ``name``, ``raised``, ``value`` and ``message`` of every check;
            ``cost`` of the training, as :attr:`robust_pl.callbacks.ComputeMonitor.cost` has it; ``versions``: of packages;
            ``hardware`` in words; ``config``. All of them may be missing, and then the report lacks them.

    Raises:
        ValueError: if a column that every report needs is missing, columns differ in length, or there is no sample.
    """

    columns: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {name: _array(column) for name, column in self.columns.items()}
        for name in ("index", "label", "prediction"):
            if name not in arrays:
                raise ValueError(f"the table lacks the column {name!r}: it has {', '.join(arrays) or 'none'}")
        lengths = {name: len(array) for name, array in arrays.items()}
        odd = next((name for name, length in lengths.items() if length != lengths["index"]), None)
        if odd is not None:
            raise ValueError(f"the column {odd!r} has {lengths[odd]} samples and 'index' {lengths['index']}: they must agree")
        if not lengths["index"]:
            raise ValueError("there is nothing to report: the table holds no sample")
        object.__setattr__(self, "columns", arrays)

    def __len__(self) -> int:
        return len(self.columns["index"])

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, in order."""
        return [name.removeprefix("prediction_") for name in self.columns if name.startswith("prediction_")]

    def right(self, attack: str | None = None) -> np.ndarray:
        """Whether the network is right under an attack, or on the clean image: bool (N,)."""
        if attack is not None and f"prediction_{attack}" not in self.columns:
            raise ValueError(f"no attack is called {attack!r}: there are {', '.join(self.attacks) or 'none'}")
        return self.columns["prediction" if attack is None else f"prediction_{attack}"] == self.columns["label"]

    def parts(self, attack: str) -> dict[str, np.ndarray]:
        """Name of a part of the attack -> whether each sample stands after it: bool (N,). What stood before all is left out."""
        found = {}
        for name, column in self.columns.items():
            # With attacks "aa" and "aa_l2", robust_aa_l2_square belongs to the longer name.
            owners = [a for a in self.attacks if name.startswith(f"robust_{a}_")]
            if owners and max(owners, key=len) == attack and name != f"robust_{attack}_clean":
                found[name.removeprefix(f"robust_{attack}_")] = column.astype(bool)
        return found

    def about(self, attack: str) -> Mapping[str, Any]:
        """What ``meta`` says of an attack."""
        return self.meta.get("attacks", {}).get(attack, {})


def _array(column: Any) -> np.ndarray:
    return column.detach().cpu().numpy() if isinstance(column, Tensor) else np.asarray(column)
