"""The checks of one stored batch of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks.attacks.checks import outside_ball, outside_box
from ..callbacks.store.store import IMAGES, sha256_of_data
from ..functional import geometry
from ..functional.geometry import NORMS
from ..functional.losses import cross_entropy
from ..functional.ratio import Ratio
from .audited import Audit

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
_TOLERANCE = 1e-5
# Of the largest logit: another device or another number of threads sums in another order, in few bits more so.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_OF_FEW_BITS = 3e-2


def malformed(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str | None:
    """Why a shard is none that an evaluation wrote; None if it is one."""
    kinds = {"columns": list, "classes": int, "seconds": dict, "data": str}
    for key, kind in kinds.items():
        if not isinstance(meta.get(key), kind):
            return f"its {key} are missing"
    of_attack = ("right", "prediction", *NORMS, "forwards", "backwards")
    needed = {"index", "label", "prediction", "confidence", "loss", *meta["columns"]}
    needed |= {f"{kind}_{name}" for name in meta["seconds"] for kind in of_attack}
    for name in sorted(needed):
        if name not in tensors:
            return f"it holds no {name}"
    for name, tensor in tensors.items():
        if len(tensor) != len(tensors["index"]) or not len(tensor):
            return f"{name} is not as long as the index"
    if not all(isinstance(seconds, int | float) for seconds in meta["seconds"].values()):
        return "its seconds are no numbers"
    if int(tensors["label"].min()) < 0 or int(tensors["label"].max()) >= meta["classes"]:
        return f"its labels are not in [0, {meta['classes']})"
    return None


class Batch:
    """The checks of one stored batch.

    Args:
        found: what is told what was looked at.
        tensors: of the shard.
        meta: of the shard.
        threats: name of the attack -> its norm and radius.
        device: where the network runs.
    """

    def __init__(
        self,
        found: Audit,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        threats: Mapping[str, Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self.found, self.tensors, self.meta, self.threats, self.device = found, tensors, meta, threats, device
        self.index, self.label = tensors["index"], tensors["label"]

    def check(self, model: nn.Module, read: Read) -> None:
        """Compare with what the data and the network say today."""
        try:
            x, y = read(self.index)
        except IndexError as error:
            self.found.check("samples", f"{self._name()} are not all in the data set: {error}")
            return
        self._same("labels", self.label, y)
        if sha256_of_data(x, y) != self.meta["data"]:
            self.found.check("clean images", f"those of samples {self._name()} are not those that were evaluated")
        else:
            self.found.check("clean images", count=len(x))
        logits = self._logits(model, x)
        self._check_predictions("clean predictions", self.tensors["prediction"], logits)
        for name, computed in (("confidence", logits.softmax(1).amax(1)), ("loss", cross_entropy(logits, self.label))):
            close = torch.isclose(self.tensors[name].float(), computed, rtol=self.rounding * 10, atol=self.rounding * 10)
            self._all(f"clean {name}", close, "other than stored")
        for attack in self.meta["seconds"]:
            self._check_attack(model, attack, x)

    def _check_attack(self, model: nn.Module, attack: str, x: Tensor) -> None:
        column = {kind: self.tensors[f"{kind}_{attack}"] for kind in ("right", "prediction", *NORMS)}
        self._same(f"{attack}: verdicts", column["right"], column["prediction"] == self.label)
        self._check_parts(attack, column["right"])
        if IMAGES + attack not in self.tensors:
            self._skip(f"images of {attack}, which were not kept (evaluation.save_adversarial)")
            return
        x_adv = self.tensors[IMAGES + attack]
        finite = bool(x_adv.isfinite().all())
        self.found.check(f"{attack}: finite", None if finite else f"samples {self._name()} hold NaN", count=len(x_adv))
        outside = bool(outside_box(x_adv))
        self.found.check(f"{attack}: in the box", f"samples {self._name()} leave [0, 1]" if outside else None, len(x_adv))
        seen = x_adv.to(x.dtype)
        for norm in NORMS:
            sizes = geometry.size(seen.to(x_adv.dtype) - x, norm)
            close = torch.isclose(sizes.double(), column[norm].double(), rtol=_TOLERANCE, atol=_TOLERANCE)
            self._all(f"{attack}: {norm} sizes", close, "other than stored")
        threat = self.threats.get(attack, {})
        if threat.get("eps") is not None:
            sizes = geometry.size(x_adv - x, threat["norm"])
            too_large = outside_ball(sizes, Ratio(threat["eps"]), threat["norm"])
            problem = f"samples {self._name()}: up to {sizes.max():.6g}, allowed {threat['eps']}" if too_large else None
            self.found.check(f"{attack}: in the ball", problem, len(x_adv))
        else:
            self._skip(f"the ball of {attack}, which has no one radius")
        self._check_predictions(f"{attack}: predictions", column["prediction"], self._logits(model, seen))

    def _check_parts(self, attack: str, right: Tensor) -> None:
        """What stands after a later part has stood before."""
        prefix = f"robust_{attack}_"
        parts = [self.tensors[name] for name in self.meta["columns"] if name.startswith(prefix)]
        for before, after in pairwise(parts):
            self._all(f"{attack}: parts", before | ~after, "stand again after a later part")

    def _skip(self, reason: str) -> None:
        if reason not in self.found.skipped:
            self.found.skipped.append(reason)

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        logits = model(x.to(self.device)).cpu()
        self.rounding = _ROUNDING.get(logits.dtype, _ROUNDING_OF_FEW_BITS)
        return logits.float()

    def _check_predictions(self, what: str, stored: Tensor, logits: Tensor) -> None:
        """A class that ties with the largest logit within rounding is no other prediction."""
        known = (stored >= 0) & (stored < logits.shape[1])
        theirs = logits.gather(1, stored.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        ties = logits.amax(1) - theirs <= self.rounding * logits.abs().amax(1)
        self._all(what, known & ties, "other than stored")

    def _same(self, what: str, stored: Tensor, computed: Tensor) -> None:
        self._all(what, stored == computed, "other than stored")

    def _all(self, what: str, right: Tensor, complaint: str) -> None:
        wrong = self.index[~right].tolist()
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        self.found.check(what, f"samples {shown}: {complaint}" if wrong else None, len(right))

    def _name(self) -> str:
        return f"{int(self.index.min())} to {int(self.index.max())}"
