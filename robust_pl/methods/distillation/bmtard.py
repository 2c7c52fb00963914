"""B-MTARD."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...functional.distillation import KLReduction, balance_entropies, entropy
from ..base import OptimizerFactory
from ..ranks import mean_over_ranks
from ..schedules import Schedule
from .igdm import IGDM
from .mtard import MTARD, TwiceTaughtExample


class BMTARD(MTARD):
    """B-MTARD (Zhao et al. 2024, arXiv 2306.16170): MTARD whose teachers are brought to equal entropy by their temperatures.

    The target of each teacher is softmax(T / tau), that of the student softmax(S). After each step the teacher whose softened
    predictions have the larger mean entropy gets a smaller tau and the other a larger one, see
    :func:`robust_pl.functional.distillation.balance_entropies`. Normalisation loss balance is MTARD's balance at beta = 1, in
    which its division by a mean cancels. Temperatures are part of the checkpoint.

    Cost: that of :class:`MTARD`.

    Args:
        temperature_rate: how far temperatures go in one step; it falls with the learning rate, as in the authors' code. They
            take 0.001 at 391 steps an epoch and 300 epochs: short runs need more.
        max_temperature: temperatures stay in [1, max_temperature].
        net: see :class:`MTARD`, and so all others.

    Raises:
        ValueError: if an argument is out of its range.
    """

    temperatures: Tensor

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        clean_teacher: nn.Module,
        attack: Attack | None = None,
        balance_rate: float = 0.025,
        temperature_rate: float = 0.001,
        max_temperature: float = 10.0,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(
            net,
            teacher,
            clean_teacher,
            attack,
            balance_rate,
            1.0,
            igdm,
            kl_reduction,
            optimizer,
            schedule,
            weights,
            num_classes,
        )
        if temperature_rate < 0:
            raise ValueError(f"temperature_rate={temperature_rate} must be at least 0")
        if max_temperature < 1:
            raise ValueError(f"max_temperature={max_temperature} must be at least 1, where temperatures begin")
        self.temperature_rate, self.max_temperature = temperature_rate, max_temperature
        self.register_buffer("temperatures", torch.ones(2))

    def targets(self, example: TwiceTaughtExample) -> tuple[Tensor, Tensor]:
        robust, clean = super().targets(example)
        return robust / self.temperatures[0], clean / self.temperatures[1]

    def after_step(self, example: TwiceTaughtExample) -> None:
        super().after_step(example)
        entropies = mean_over_ranks(torch.stack([entropy(target).mean() for target in self.targets(example)]))
        rate = self.temperature_rate * self.lr_factor()
        moved = balance_entropies(self.temperatures, entropies.to(self.temperatures), rate, high=self.max_temperature)
        self.temperatures.copy_(moved)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log_dict({"train/temperature_robust": self.temperatures[0], "train/temperature_clean": self.temperatures[1]})
