"""PGD adversarial training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...callbacks.attacks.pgd import PGD
from ..base import Method
from ..example import Example


class PGDAT(Method):
    """Adversarial training (Madry et al. 2018, arXiv 1706.06083): cross-entropy on attacked samples alone.

    Without an attack it takes PGD-10 at 8/255 from a random start. Cost: the attack's passes, and one forward and one
    backward pass a step: 11 + 11 with PGD-10.
    """

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x_adv), example.y)
