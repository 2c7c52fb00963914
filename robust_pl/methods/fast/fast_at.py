"""Fast adversarial training."""

from __future__ import annotations

from ...callbacks.attacks.fgsm import FGSM
from ..adversarial.pgd_at import PGDAT


class FastAT(PGDAT):
    """Fast adversarial training (Wong et al. 2020, arXiv 2001.03994): FGSM from a random start, with a step of 1.25 eps.

    Without an attack it takes that at 8/255, with BatchNorm in train mode as the authors have it. It may overfit to its own
    attack (catastrophic overfitting): watch it with :class:`robust_pl.callbacks.CatastrophicOverfitting`. Cost: two forward and
    two backward passes a step.
    """

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, 10 / 255, random_start=True, bn_mode="train")
