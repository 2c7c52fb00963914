"""N-FGSM."""

from __future__ import annotations

from ...callbacks.attacks.noisy_fgsm import NoisyFGSM
from ..adversarial.pgd_at import PGDAT


class NFGSM(PGDAT):
    """N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): one step from noise of twice eps, and no way back into the ball.

    Without an attack it takes :class:`robust_pl.callbacks.NoisyFGSM` at 8/255. Any attack can be given, but one that projects
    onto the ball makes it :class:`FastAT`. Cost: two forward and two backward passes a step.
    """

    @staticmethod
    def default_attack() -> NoisyFGSM:
        return NoisyFGSM()
