"""GradAlign."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import OBJECTIVES, Attack
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.problem import Objective
from ...functional.gradients import input_gradient
from ...functional.regularizers import gradient_alignment
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .crafting import draws_of, radius_of


@dataclass
class AlignedExample(Example):
    """A batch with what GradAlign compares.

    Args:
        gradient: at x, (B, C, H, W).
        noise: uniform in the ball, likewise.
    """

    gradient: Tensor | None = None
    noise: Tensor | None = None


class GradAlign(Method):
    """GradAlign (Andriushchenko and Flammarion 2020, arXiv 2007.02617): FGSM adversarial training + lmbda * (1 - cosine).

    The cosine is that between the input gradient at x, which the attack found and which is held fixed, and that at
    x + U(-eps, eps), which is differentiated once more. Both are gradients of what the attack maximises: ``ce_hard`` takes
    mixed or smoothed labels as their largest entry, there alone. A compiled network is refused. Cost: three forward and three
    backward passes a step, and a backward pass through the third of these, which is about as dear as two.

    Args:
        attack: without a random start, since its gradient at x is used again; without one, FGSM at 8/255 in train mode.
        lmbda: weight; 0.2 at 8/255, and rising with eps to 2 at 16/255.
        box: cut x + noise to [0, 1], as a public benchmark has it (Pan and Yao 2026, arXiv 2604.22853); the authors do not.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if lmbda is negative, or the attack is random, maximises something else than cross-entropy, has another
            norm than linf, or takes no gradient at x.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 0.2,
        box: bool = False,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if self.attack.is_random:
            raise ValueError(
                "GradAlign uses the attack's gradient at x again, and this attack is random: set attack.random_start to False"
            )
        if self.attack.objective not in (None, "ce", "ce_hard"):
            raise ValueError(
                f"GradAlign compares gradients of cross-entropy and attack.objective is {self.attack.objective!r}: choose ce "
                "or ce_hard"
            )
        if self.attack.norm != "linf":
            raise ValueError(
                f"GradAlign draws its noise from the linf ball and attack.norm is {self.attack.norm!r}: choose linf"
            )
        self.lmbda, self.box = lmbda, box

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> AlignedExample:
        example = self.clean(batch)
        attacked = self.run_attack(example, eps)
        if attacked.first_gradient is None:
            raise ValueError(
                f"GradAlign uses the attack's gradient at x, and {type(self.attack).__name__} takes none: choose FGSM"
            )
        draws = draws_of(self, "gradalign", example.x.device)
        noise = radius_of(self, example.x, eps) * (2 * draws.uniform(example.x) - 1)
        x, y, index = example.x, example.y, example.index
        return AlignedExample(x, y, index, attacked.x_adv.to(x.dtype), attacked.first_gradient.to(x.dtype), noise)

    def loss(self, example: AlignedExample) -> Tensor:
        loss = F.cross_entropy(self(example.x_adv), example.y)
        point = example.x + example.noise
        if self.box:
            point = point.clamp(0.0, 1.0)
        objective = Objective(OBJECTIVES[self.attack.objective or "ce"], (example.y,))
        gradient, _ = input_gradient(self, point, objective, create_graph=True)
        return loss + self.lmbda * gradient_alignment(example.gradient, gradient)
