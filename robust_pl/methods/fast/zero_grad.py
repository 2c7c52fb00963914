"""ZeroGrad."""

from __future__ import annotations

from ...callbacks.attacks.zeroed_fgsm import ZeroedFGSM
from ..adversarial.pgd_at import PGDAT


class ZeroGrad(PGDAT):
    """ZeroGrad (Golgooni et al. 2021, arXiv 2103.15476): fast adversarial training whose step leaves out small gradients.

    It takes catastrophic overfitting to come from tiny, noisy input gradients whose sign is blown up to a whole step. Without
    an attack it takes :class:`robust_pl.callbacks.ZeroedFGSM` at 8/255 with the authors' quantile for CIFAR-10, 0.35, which is
    the only guard: on schedules much longer than their 30 epochs it overfits there, and a larger ``q`` is needed. The attack
    sees hard labels, whatever the labels of the loss. Cost: two forward and two backward passes a step.
    """

    inner_objective = "ce_hard"

    @staticmethod
    def default_attack() -> ZeroedFGSM:
        return ZeroedFGSM()
