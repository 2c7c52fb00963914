"""FR: frequency regularization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import choose
from ...callbacks.attacks.pgd import PGD
from ...functional.losses import FOURIER_MODES, FourierMode, frequency_regularization
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule

DEFAULT_LMBDA: dict[FourierMode, float] = {"batch2d": 0.1, "class1d": 1.2}


class FR(Method):
    """Frequency regularization (Huang et al. 2022, arXiv 2212.12732): adversarial cross-entropy + lmbda * spectral distance.

    The distance is that between the outputs for clean and attacked samples, see
    :func:`robust_pl.functional.losses.frequency_regularization`. With :class:`robust_pl.callbacks.SWA` it is the authors'
    FR-SWA. Outputs that do not depend on the input make it vanish: watch clean accuracy. On several processes ``batch2d``
    transforms the batch of each. Cost: the attack's passes, and two forward and two backward passes, one and one before
    ``start_epoch``: 12 + 12 with PGD-10.

    Args:
        lmbda: weight of the distance; None takes 0.1 for ``batch2d``, the authors' at a batch of 128, and for ``class1d`` 1.2,
            which is as strong there by our calculation for 10 classes.
        mode: ``batch2d`` as in the authors' code, or ``class1d`` as in their text.
        start_epoch: first epoch with the distance. The code's default is 75 of 100; the published curves have it from 0.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if lmbda or start_epoch is negative, or mode unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float | None = None,
        mode: FourierMode = "batch2d",
        start_epoch: int = 0,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        choose("mode", mode, FOURIER_MODES)
        if lmbda is not None and lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch} must be at least 0")
        self.lmbda = DEFAULT_LMBDA[mode] if lmbda is None else lmbda
        self.mode: FourierMode = mode
        self.start_epoch = start_epoch

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def distance(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """Between the outputs for clean and attacked samples, (B, K) each; a scalar."""
        return frequency_regularization(logits, logits_adv, self.mode)

    def loss(self, example: Example) -> Tensor:
        logits_adv = self(example.x_adv)
        loss = F.cross_entropy(logits_adv, example.y)
        if self.current_epoch < self.start_epoch:
            return loss
        return loss + self.lmbda * self.distance(self(example.x), logits_adv)
