"""FGSM adversarial training."""

from __future__ import annotations

from ...callbacks.attacks.fgsm import FGSM
from ..adversarial.pgd_at import PGDAT


class FGSMAT(PGDAT):
    """FGSM adversarial training (Goodfellow et al. 2015, arXiv 1412.6572): cross-entropy after one step of eps from x.

    Without an attack it takes that at 8/255, with BatchNorm in train mode. The baseline of catastrophic overfitting: at large
    eps it soon withstands its own attack alone. Cost: two forward and two backward passes a step.
    """

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")
