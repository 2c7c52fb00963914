"""AutoAttack: the standard ensemble of parameter-free attacks, each on the samples that all before it left standing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...functional.geometry import Norm
from .apgd import APGD
from .autoattack_checks import check_classes, warn_of_square, warn_of_unusual_networks
from .base import Attack
from .checks import DEFAULT_EPS, Number, check_count, choose
from .fab import FAB
from .ledger import Attacked
from .prepare import BNMode
from .problem import Classifier, Problem
from .square import Square

Version = Literal["standard", "plus", "rand", "custom"]
VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": (),
}
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
CLEAN = "clean"
_SHOWN = 8  # images that tell whether a network is unusual


class AutoAttack(Attack):
    """AutoAttack (Croce and Hein 2020, arXiv 2003.01690) under linf, l2 and l1 (2021, arXiv 2103.01208).

    Counts a sample as robust if it is classified right and no part breaks it. ``run(...).robust`` holds, for ``clean`` and
    after each part, which samples stand, bool (B,). ``x_adv`` is the clean image where nothing was found. Random numbers belong
    to samples, so batches do not matter and a call gives the same again: without ``index`` a sample's number is its place in x.

    Parts and budgets are those of the public code (fra31/auto-attack). ``standard``: apgd-ce, apgd-t, fab-t, square, where
    under l1 apgd-ce has five restarts, apgd-t five targets, and both begin in larger balls. ``plus``: apgd-ce and apgd-dlr with
    five restarts, untargeted fab with five, square, apgd-t, fab-t. ``rand``: apgd-ce and apgd-dlr with gradients averaged over
    20 passes, for networks that are random. ``custom``: the parts in ``attacks``, with the restarts of ``plus``. What the
    parts do otherwise than that code is said at :class:`APGD`, :class:`FAB` and :class:`Square`.

    Cost of a sample that stands under ``standard``: about 1 + 101 + 910 + 1100 + 5000 forward and 100 + 900 + 900
    backward passes, and a forward pass to judge each part; one that is broken costs nothing from then on. Attacked is the
    network with BatchNorm folded in and channels last (:class:`robust_pl.nets.folding.Folded`), and the network itself judges
    every part.

    It warns (:class:`AutoAttackWarning`, with a ``flag``) where the figure would mislead: of a network that answers at random
    without ``rand`` or takes gradients in its forward pass, which costs the first eight images a forward pass; of gradients
    that vanish; and of square finding what gradients did not.

    Args:
        eps: see :class:`Attack`.
        norm: see :class:`Attack`.
        version: ``standard``, ``plus``, ``rand`` or ``custom``.
        attacks: for ``custom``: names among apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in order.
        n_targets: how many classes apgd-t and fab-t aim at; None takes nine, under l1 ``standard`` five for apgd-t.
        batch_size: how many samples go through the network at once.
        fold_batchnorm: attack the network with BatchNorm folded into its convolutions.
        channels_last: show it images in channels-last memory format.
        bn_mode: see :class:`Attack`.
        seed: see :class:`Attack`.

    Raises:
        ValueError: if an argument is out of its range, or the network has too few classes for a part.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        *,
        norm: Norm = "linf",
        version: Version = "standard",
        attacks: Sequence[str] | None = None,
        n_targets: int | None = None,
        batch_size: int = 250,
        fold_batchnorm: bool = True,
        channels_last: bool = True,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, random_start=True, bn_mode=bn_mode, seed=seed)
        check_count("batch_size", batch_size)
        if n_targets is not None:
            check_count("n_targets", n_targets)
        names = _names(version, attacks)
        if version == "plus" and norm == "l1":
            warnings.warn("version='plus' has no budgets made for norm='l1': version='standard' does", stacklevel=2)
        self.version, self.n_targets, self.batch_size = version, n_targets, batch_size
        self.fold_batchnorm, self.channels_last = fold_batchnorm, channels_last
        self.parts: dict[str, Attack] = {name: self._part(name) for name in names}

    def run(self, model: nn.Module, x: Tensor, y: Tensor, *, index: Tensor | None = None, **how: Any) -> Attacked:
        """See :meth:`Attack.run`. A network in train mode is attacked in eval mode."""
        if self.bn_mode == "eval" and any(module.training for module in model.modules()):
            warnings.warn("the network is in train mode: AutoAttack evaluates it in eval mode", stacklevel=2)
        index = torch.arange(len(x)) if index is None else index
        return super().run(model, x, y, index=index, **how)

    def faster(self, model: nn.Module, fold: bool = True) -> Classifier:
        """The network itself, which judges; its parts attack a faster one."""
        return model

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        robust, logits = problem.ledger.robust, self._clean_logits(problem)
        targets = {name: self.parts[name].n_targets for name in ("apgd-t", "fab-t") if name in self.parts}
        check_classes(self.parts, logits.shape[1], self.version, targets)
        robust[CLEAN] = stands = ~problem.fooled(logits)
        if self.version != "rand" and problem.careful:
            warn_of_unusual_networks(problem, logits[:_SHOWN])
        attacked, x_adv = copy(problem), x.clone()
        attacked.asked, attacked.rows_at_once = super().faster(problem.model), self.batch_size
        for name in self.parts:
            stands = stands.clone()
            standing = stands.nonzero().squeeze(1)
            for piece, rows in enumerate(standing.split(self.batch_size) if len(standing) else ()):
                found = self._piece(name, f"{name}-{piece}" if piece else name, problem, attacked, rows)
                broken = ~found["robust"].to(x.device)
                x_adv[rows[broken]] = found["x_adv"].to(x.device)[broken]
                stands[rows[broken]] = False
            robust[name] = stands
        warn_of_square(robust)
        return x_adv

    def _piece(self, name: str, key: str, problem: Problem, attacked: Problem, rows: Tensor) -> dict[str, Tensor]:
        """One part on the samples ``rows``, or what it found in an earlier call that was interrupted."""
        judge, ledger = problem.rows(rows), problem.ledger
        counts = {"forwards": ledger.forwards, "backwards": ledger.backwards}
        kept = ledger.progress.recall(key)
        if kept is not None:
            for kind, passes in counts.items():
                passes.add(kept[kind].to(rows.device), judge.ids)
            return kept
        before = {kind: passes.of_each[judge.ids] for kind, passes in counts.items()}
        part = self.parts[name]
        part.name = name
        x_adv = part.attempt(attacked.rows(rows, problem.draws.fork(name).rows(rows)))
        found = {"x_adv": x_adv, "robust": ~judge.fooled(judge.logits(x_adv))}
        found |= {kind: passes.of_each[judge.ids] - before[kind] for kind, passes in counts.items()}
        ledger.progress.remember(key, found)
        return found

    def _clean_logits(self, problem: Problem) -> Tensor:
        if len(problem.x) <= self.batch_size:
            return problem.logits(problem.x)
        pieces = []
        for rows in torch.arange(len(problem.x), device=problem.x.device).split(self.batch_size):
            part = problem.rows(rows)
            part.careful = problem.careful
            pieces.append(part.logits(part.x))
        return torch.cat(pieces)

    def _part(self, name: str) -> Attack:
        """One part with the budget of the version."""
        l1_standard = self.norm == "l1" and self.version == "standard"
        common: dict[str, Any] = {"norm": self.norm, "bn_mode": self.bn_mode, "seed": self.seed}
        restarts = 5 if self.version in ("plus", "custom") else 1
        if name == "square":
            return Square(self.eps, n_queries=5000, p_init=0.8, **common)
        if name == "fab":
            return FAB(self.eps, n_targets=None, restarts=restarts, **common)
        if name == "fab-t":
            return FAB(self.eps, n_targets=self.n_targets or 9, **common)
        if name == "apgd-t":
            targets = self.n_targets or (5 if l1_standard else 9)
            return APGD(self.eps, loss="dlr-targeted", n_targets=targets, use_largereps=l1_standard, **common)
        return APGD(
            self.eps,
            loss="ce" if name == "apgd-ce" else "dlr",
            restarts=5 if l1_standard else restarts,
            eot_iter=20 if self.version == "rand" else 1,
            use_largereps=l1_standard,
            **common,
        )


def _names(version: str, attacks: Sequence[str] | None) -> tuple[str, ...]:
    choose("version", version, tuple(VERSIONS))
    if version != "custom":
        if attacks is not None:
            raise ValueError(
                f"attacks={list(attacks)} and version={version!r}, which names its own: leave it out, or set version='custom'"
            )
        return VERSIONS[version]
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks={attacks!r} with version='custom': give a list of names among {', '.join(PARTS)}")
    for name in attacks:
        choose("attacks", name, PARTS)
    if len(set(attacks)) < len(attacks):
        raise ValueError(f"attacks={list(attacks)} names one twice: name each once")
    return tuple(attacks)
