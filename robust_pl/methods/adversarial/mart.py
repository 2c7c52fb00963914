"""MART."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.losses import mart
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class MART(Method):
    """MART (Wang et al. 2020, openreview rklOg6EFwS): consistency weighted by how badly the clean sample is classified.

    See :func:`robust_pl.functional.losses.mart`. The attack maximises cross-entropy, from x + 0.001 * N(0, 1) without an attack
    of your own. Its gain under PGD shrinks under AutoAttack: report both. With AWP it diverged for WRN-34-10 in a published
    benchmark (MAIR): start that after some epochs, or take a smaller gamma. Cost: the attack's passes, and two forward and two
    backward passes: 12 + 12 with PGD-10.

    Args:
        beta: weight of the consistency term; the authors take 5 for ResNet-18 and 6 for WRN-34-10.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if beta is negative.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        beta: float = 5.0,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if beta < 0:
            raise ValueError(f"beta={beta} must be at least 0")
        self.beta = beta

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    def loss(self, example: Example) -> Tensor:
        return mart(self(example.x), self(example.x_adv), example.y, self.beta)
