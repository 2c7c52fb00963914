"""What an attack writes down on its way: passes spent, parts finished, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


class Progress:
    """Who follows a call of an attack: keeps its finished parts and shows how far it is. This one does neither."""

    def recall(self, part: str) -> dict[str, Tensor] | None:
        """What :meth:`remember` was given in an earlier, interrupted call for the same samples; None if nothing."""
        return None

    def remember(self, part: str, found: dict[str, Tensor]) -> None:
        """Keep the outcome of a finished part."""

    def show(self, part: str, standing: int, done: float) -> None:
        """``part`` of the attack is through to the share ``done`` in [0, 1]; ``standing`` samples still are to be broken."""


class Passes:
    """Passes over the network, sample by sample. Those of the whole batch are counted without making a GPU wait."""

    def __init__(self, samples: int, device: torch.device) -> None:
        self.samples, self.device = samples, device
        self._all = 0
        self._some: Tensor | None = None

    @classmethod
    def of(cls, each: Tensor) -> Passes:
        """Counts that are known already, int64 (B,)."""
        passes = cls(len(each), each.device)
        passes._some = each
        return passes

    def add(self, times: int | Tensor, ids: Tensor | None) -> None:
        """Count ``times`` more passes for the samples ``ids`` (n,), or for all of them."""
        if ids is None and isinstance(times, int):
            self._all += times
            return
        if self._some is None:
            self._some = torch.zeros(self.samples, dtype=torch.int64, device=self.device)
        if ids is None:
            self._some += times
        else:
            self._some.index_add_(0, ids, torch.as_tensor(times, device=self.device).expand(len(ids)))

    @property
    def total(self) -> int:
        """Summed over samples."""
        return self._all * self.samples + (0 if self._some is None else int(self._some.sum()))

    @property
    def of_each(self) -> Tensor:
        """Of each sample, int64 (B,)."""
        whole = torch.full((self.samples,), self._all, dtype=torch.int64, device=self.device)
        return whole if self._some is None else whole + self._some


@dataclass(frozen=True)
class Attacked:
    """What one call of an attack found and spent.

    Args:
        x_adv: adversarial pixels (B, C, H, W).
        forward_passes: of each sample.
        backward_passes: of each sample.
        start: the point of the first gradient, (B, C, H, W); None if no gradient was taken.
        first_logits: logits at ``start``, (B, K), in the attack's ``bn_mode``; with their graph where that was to be kept.
        first_gradient: gradient of the objective at ``start``, (B, C, H, W).
        robust: for attacks of several parts: name of the part -> whether each sample stands after it, bool (B,).
        norms: size of the perturbation in the attack's norm (B,).
    """

    x_adv: Tensor
    forward_passes: Passes
    backward_passes: Passes
    start: Tensor | None = None
    first_logits: Tensor | None = None
    robust: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor | None = None
    first_gradient: Tensor | None = None

    @property
    def forwards(self) -> int:
        """Forward passes, summed over samples."""
        return self.forward_passes.total

    @property
    def backwards(self) -> int:
        """Backward passes, summed over samples."""
        return self.backward_passes.total


class Ledger:
    """What a problem and all problems made from it write down together."""

    def __init__(self, samples: int, device: torch.device, progress: Progress) -> None:
        self.forwards = Passes(samples, device)
        self.backwards = Passes(samples, device)
        self.bad_gradient = torch.zeros((), dtype=torch.bool, device=device)
        self.checked = False
        self.start: Tensor | None = None
        self.first_logits: Tensor | None = None
        self.first_gradient: Tensor | None = None
        self.keep_graph = False
        self.robust: dict[str, Tensor] = {}
        self.progress = progress
