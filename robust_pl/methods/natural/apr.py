"""APR: amplitude-phase recombination."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...data.apr import APRPair
from ..example import Example
from .augmented import AugmentedTraining


class APR(AugmentedTraining):
    """APR-P (Chen et al. 2021, arXiv 2108.08487): images, and the same with amplitudes of others, CE(x, y) + CE(x_apr, y).

    The two cross-entropies are added, as in the authors' code, in one forward pass of [x; x_apr]: a learning rate that was
    chosen for their mean is twice too large here. A batch that the coin leaves unchanged counts twice. With
    :class:`robust_pl.data.APRSingle` in the data's list ``augment`` it is APR-SP; APR-S alone is that list and standard
    training. With an attack both halves are attacked after the recombination, as in the authors' runs with FGSM.

    Cost: one forward and one backward pass on twice the batch, 2 + 2, and the attack's passes twice.

    Args:
        net: see :class:`Method`, and so all others.
        attack: see :class:`AugmentedTraining`.
        augmentation: None takes :class:`robust_pl.data.APRPair` with the probability of CIFAR and values that may leave
            [0, 1], as the authors do; another one is trained on likewise.
        seed: of the coins and partners; None takes that of the data module.

    Raises:
        ValueError: if the augmentation mixes labels.
    """

    @staticmethod
    def default_augmentation() -> APRPair:
        return APRPair(overflow="keep")

    def loss(self, example: Example) -> Tensor:
        y = self.labels(example)
        original, changed = self.logits(example)
        return F.cross_entropy(original, y) + F.cross_entropy(changed, y)
