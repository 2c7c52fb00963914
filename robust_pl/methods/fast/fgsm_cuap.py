"""FGSM-CUAP."""

from __future__ import annotations

from torch import Tensor

from ...functional.losses import hard
from ..example import Example
from .fgsm_uap import FGSMUAP


class FGSMCUAP(FGSMUAP):
    """FGSM-CUAP (Pan, Li and Yao, AAAI 2024): :class:`FGSMUAP` with one universal perturbation for each class.

    Samples begin at that of their own class; mixed or smoothed labels count as their largest entry. 0.25 MB for the ten
    classes of CIFAR-10, 20 MB for the 200 of Tiny-ImageNet. Cost: two forward and three backward passes a step.
    """

    def perturbations(self) -> int:
        return self.num_classes

    def group(self, example: Example) -> Tensor:
        return hard(example.y)
