"""ABSLD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.problem import Objective
from ...functional.distillation import KLReduction, class_temperatures
from ...functional.losses import cross_entropy, hard, kl_divergence
from ...metrics.class_errors import ClassErrors
from ..base import OptimizerFactory
from ..schedules import Schedule
from .base import Distillation, TaughtExample
from .igdm import IGDM


@dataclass
class JudgedExample(TaughtExample):
    """A batch with the student's errors on it.

    Args:
        errors: cross-entropy on attacked and on clean pixels, (B, 2); written where the loss is first asked, at the weights of
            the step.
    """

    errors: Tensor | None = None


class ABSLD(Distillation):
    """Anti-bias soft label distillation (Zhao et al. 2024, arXiv 2312.05508): RSLAD with a temperature for each class.

    L = alpha * KL(softmax(T(x) / tau_adv[y]) || S(x_adv)) + (1 - alpha) * KL(softmax(T(x) / tau_nat[y]) || S(x)). The attack
    maximises the first divergence. At the end of each epoch the temperatures of classes on which the student errs more than on
    average fall, which sharpens their labels, and the others' rise, see
    :func:`robust_pl.functional.distillation.class_temperatures`. Errors are the cross-entropies of the training steps: no pass
    is added. The authors sum them by class; here they are class means, which is the same on balanced data. Temperatures and the
    errors of the running epoch are equal on all processes and part of the checkpoint.

    Cost: that of :class:`RSLAD`.

    Args:
        alpha: weight of the attacked pixels; 5/6 is the authors'.
        temperature_rate: largest step of a temperature in one epoch; it falls with the learning rate, as in the authors' code.
            They take 0.1 and 300 epochs: short runs need more.
        min_temperature: temperatures stay at or above this,
        max_temperature: and at or below that.
        official_alias: for exact reproduction of the authors' code, whose two temperatures divide one tensor in place, so that
            both labels follow the product tau_adv[y] * tau_nat[y].
        net: see :class:`Distillation`, and so all others.

    Raises:
        ValueError: if an argument is out of its range.
    """

    temperatures: Tensor

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        alpha: float = 5 / 6,
        temperature_rate: float = 0.1,
        min_temperature: float = 0.5,
        max_temperature: float = 5.0,
        official_alias: bool = False,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, teacher, attack, igdm, kl_reduction, optimizer, schedule, weights, num_classes)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is a share: choose from [0, 1]")
        if temperature_rate < 0:
            raise ValueError(f"temperature_rate={temperature_rate} must be at least 0")
        if not 0 < min_temperature <= 1 <= max_temperature:
            raise ValueError(
                f"min_temperature={min_temperature} and max_temperature={max_temperature} must be above 0 and on either side "
                "of 1, where temperatures begin"
            )
        self.alpha, self.temperature_rate, self.official_alias = alpha, temperature_rate, official_alias
        self.min_temperature, self.max_temperature = min_temperature, max_temperature
        # In columns: of attacked and of clean pixels.
        self.register_buffer("temperatures", torch.ones(num_classes, 2))
        self.class_errors = ClassErrors(num_classes, 2)

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    def clean(self, batch: tuple[Tensor, ...]) -> JudgedExample:
        return JudgedExample(**vars(super().clean(batch)))

    def targets(self, example: TaughtExample) -> tuple[Tensor, Tensor]:
        """Logits (B, K) that the student learns on attacked and on clean pixels; mixed labels count as their largest entry."""
        tau = self.temperatures[hard(example.y)]
        if self.official_alias:
            tau = tau.prod(1, keepdim=True).expand(-1, 2)
        return example.teacher_logits / tau[:, :1], example.teacher_logits / tau[:, 1:]

    def attack_objective(self, example: TaughtExample) -> Objective:
        return Objective(kl_divergence, (self.targets(example)[0],))

    def distil(self, example: JudgedExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        if example.errors is None:
            example.errors = torch.stack([cross_entropy(out.detach(), example.y) for out in (logits_adv, logits)], 1)
        for_adv, for_clean = self.targets(example)
        adversarial, clean = (self.reduce(kl_divergence(*pair)) for pair in ((logits_adv, for_adv), (logits, for_clean)))
        return self.alpha * adversarial + (1 - self.alpha) * clean

    def after_step(self, example: JudgedExample) -> None:
        self.class_errors.add(example.errors, hard(example.y))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Resumed from between the last step of an epoch and its validation, Lightning leaves out the end of that epoch.
        if batch_idx == 0 and self.class_errors.counts.any():
            self._move_temperatures()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._move_temperatures()
        self.log_dict(_ends(self.temperatures))

    def _move_temperatures(self) -> None:
        """What the errors of an epoch say; those of the next are counted anew."""
        moved = class_temperatures(
            self.temperatures,
            self.class_errors.means(),
            self.temperature_rate * self.lr_factor(),
            self.min_temperature,
            self.max_temperature,
        )
        self.temperatures.copy_(moved)
        self.class_errors.reset()


def _ends(temperatures: Tensor) -> dict[str, Any]:
    """The smallest and the largest temperature of either term, for the log."""
    low, high = temperatures.amin(0), temperatures.amax(0)
    return {
        f"train/temperature_{term}_{end}": value[i]
        for i, term in enumerate(("robust", "clean"))
        for end, value in (("min", low), ("max", high))
    }
