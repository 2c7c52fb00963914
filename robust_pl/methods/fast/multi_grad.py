"""MultiGrad."""

from __future__ import annotations

from ...callbacks.attacks.unanimous_fgsm import UnanimousFGSM
from ..adversarial.pgd_at import PGDAT


class MultiGrad(PGDAT):
    """MultiGrad (Golgooni et al. 2021, arXiv 2103.15476): FGSM adversarial training along signs that the ball agrees on.

    Pixels whose gradient changes its sign between random points of the ball stay as they are. Without an attack it takes
    :class:`robust_pl.callbacks.UnanimousFGSM` at 8/255 with three points. The attack sees hard labels, whatever the labels of
    the loss. Cost: one forward and one backward pass a step more than the attack's points: four and four with three.
    """

    inner_objective = "ce_hard"

    @staticmethod
    def default_attack() -> UnanimousFGSM:
        return UnanimousFGSM()
