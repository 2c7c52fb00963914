"""Checks that compare attacks, of which the stronger must not do worse.

The list is that of Athalye et al. (2018, arXiv 1802.00420) and Carlini et al. (2019, arXiv 1902.06705).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.square import Square
from .evidence import Evidence
from .flag import Flag

_NONE_LEFT = 0.01
_POINT = 0.01
_MORE = 3
_RESTARTS = 5


def single_step_beats_iterative(evidence: Evidence) -> Flag:
    """Accuracy under PGD minus that under FGSM, both on cross-entropy from x. 23 passes with 20 steps."""
    steps = evidence.steps
    return _not_stronger(
        "single_step_beats_iterative", ("FGSM", evidence.pgd(steps=1)), (f"PGD-{steps}", evidence.pgd(steps=steps))
    )


def more_steps_not_stronger(evidence: Evidence) -> Flag:
    """Accuracy under PGD with three times the steps, and as much smaller ones, minus that under PGD. 82 passes."""
    few, many = evidence.steps, _MORE * evidence.steps
    return _not_stronger(
        "more_steps_not_stronger", (f"PGD-{few}", evidence.pgd(steps=few)), (f"PGD-{many}", evidence.pgd(steps=many))
    )


def larger_eps_not_stronger(evidence: Evidence) -> Flag:
    """Largest rise of the accuracy under PGD from eps to 2 eps, or from 2 eps to 4 eps. 63 passes."""
    runs = [(f"PGD at eps={eps:.4g}", evidence.pgd(eps=eps)) for eps in (evidence.eps * factor for factor in (1, 2, 4))]
    steps = [_not_stronger("larger_eps_not_stronger", *pair) for pair in pairwise(runs)]
    return max(steps, key=lambda flag: flag.value - flag.threshold)


def unbounded_attack_fails(evidence: Evidence) -> Flag:
    """Accuracy under PGD that may change the image into any other one, linf 1.0: it must be none. 40 passes."""
    steps = 2 * evidence.steps
    value = evidence.pgd(eps=1.0, norm="linf", steps=steps).sum().item() / evidence.samples
    return Flag(
        "unbounded_attack_fails",
        value > _NONE_LEFT,
        value,
        _NONE_LEFT,
        f"accuracy is {value:.1%} under PGD-{steps} at linf eps=1.0, where any image is allowed",
    )


def black_box_beats_white_box(evidence: Evidence, queries: int) -> Flag:
    """Share of samples that a search which sees scores alone breaks, and gradients do not.

    The gradient attacks, all at eps, are FGSM, PGD, PGD of more steps and PGD on the margin; Square goes on where they fail.
    What it breaks counts only if PGD towards the very class that it found fails as well, from five random starts: attacks
    that are not targeted end in the wrong class now and then even on a linear network, whose gradients hide nothing.
    AutoAttack allows 0.2 % of 10,000 samples; here it is one point, and at least two samples. Cost: 104 passes with 20
    steps, ``queries`` forward passes on what stands, and up to 105 passes on what these break.
    """
    steps = evidence.steps
    white = evidence.pgd(steps=1) & evidence.pgd() & evidence.pgd(steps=_MORE * steps) & evidence.pgd(objective="margin")
    rows = white.nonzero().squeeze(1)
    square = Square(evidence.eps, n_queries=queries, rescale_schedule=True, norm=evidence.norm, seed=evidence.seed)
    said = evidence.under(square, rows, evidence.y[rows])
    fell = said != evidence.y[rows]
    pgd = PGD(evidence.eps, steps=steps, norm=evidence.norm, restarts=_RESTARTS, targeted=True, seed=evidence.seed)
    again = evidence.under(pgd, rows[fell], said[fell])
    value = int((again == evidence.y[rows[fell]]).sum()) / evidence.samples
    threshold = max(_POINT, 2 / evidence.samples)
    return Flag(
        "black_box_beats_white_box",
        value > threshold,
        value,
        threshold,
        f"{len(rows)} of {evidence.samples} samples stand against gradients; {queries} queries break {int(fell.sum())} of "
        f"them, of which gradients towards the class found miss {value * evidence.samples:.0f}",
    )


def _not_stronger(name: str, weaker: tuple[str, Tensor], stronger: tuple[str, Tensor]) -> Flag:
    """By how much more samples stand against what should be the stronger of two attacks, beyond chance.

    PGD ends where it ends, so either attack breaks some samples that the other one does not. The threshold is two standard
    deviations of the difference if those were tosses of a coin (a one-sided sign test), and at least one point.
    """
    before, after = weaker[1], stronger[1]
    samples, differ = len(before), int((before != after).sum())
    value = (int(after.sum()) - int(before.sum())) / samples
    threshold = max(_POINT, 2 * differ**0.5 / samples)
    shares = [f"{stands.sum().item() / samples:.1%} under {attack}" for attack, stands in (weaker, stronger)]
    return Flag(name, value > threshold, value, threshold, f"accuracy on {samples} samples is {shares[0]} and {shares[1]}")
