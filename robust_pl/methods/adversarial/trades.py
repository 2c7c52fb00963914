"""TRADES."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.losses import trades
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class TRADES(Method):
    """TRADES (Zhang et al. 2019, arXiv 1901.08573): clean cross-entropy + beta * KL(clean || adversarial).

    The attack maximises the same KL, from x + 0.001 * N(0, 1) without an attack of your own. One clean and one adversarial
    forward a step, each normalised by its own batch; the authors' code forwards the clean batch twice in train mode, which
    moves BatchNorm's statistics once more. Cost: the attack's passes, one of which is the clean prediction that it keeps
    fixed, and two forward and two backward passes: 13 + 12 with PGD-10.

    Args:
        beta: weight of the KL term, 1/lambda in the paper; 6 is the authors' choice on CIFAR-10.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if beta is negative.
    """

    inner_objective = "kl"

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        beta: float = 6.0,
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
        return trades(self(example.x), self(example.x_adv), example.y, self.beta)
