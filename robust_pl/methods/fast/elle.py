"""ELLE."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.fgsm import FGSM
from ...functional.losses import hard, hard_cross_entropy, wide
from ...functional.regularizers import linearity_error
from ...nets.statistics import untracked
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .crafting import draws_of, radius_of


@dataclass
class TripleExample(Example):
    """A batch with points on a line through each sample's ball.

    Args:
        points: x_a, x_b and x_c between them, (B, 3, C, H, W); they may lie outside of [0, 1].
        share: of x_b in x_c, (B,).
        errors: squared error of a linear loss, (B,); written where the loss is first asked, at the weights of the step.
    """

    points: Tensor | None = None
    share: Tensor | None = None
    errors: Tensor | None = None


class ELLE(Method):
    """ELLE (Abad Rocamora et al. 2024, arXiv 2401.11618): FGSM adversarial training on a loss that is kept linear in the ball.

    L = CE(x_adv, y) + lmbda * mean [l(x_c) - (1 - a) l(x_a) - a l(x_b)]^2, where l is the cross-entropy of the hard label,
    x_a and x_b are independent in x + U(-eps, eps), and x_c = (1 - a) x_a + a x_b with a from U(0, 1) for each sample. None of
    the three is cut to the box, as in the authors' code, and the gradient flows through all of them. The three go through the
    network as one batch of 3 B, which takes three times the memory of a step.

    Without an attack it takes the authors' step of 8/255 from x, in train mode; theirs is not cut to the box, ours is. Any
    attack can be given, and need not stay in the ball: :class:`robust_pl.callbacks.NoisyFGSM` for N-FGSM + ELLE, and
    ``NoisyFGSM(8/255, k=1, step_size=10/255)`` for the public benchmark's (arXiv 2604.22853), which begins in the ball, is cut
    to the box alone and reaches 2.25 eps. The benchmark sets lmbda to 1, a thousandth of the authors', and its runs collapse.
    Cost: five forward and five backward passes a step, three of them as one.

    Args:
        attack: of norm linf; its eps is that of the points.
        lmbda: weight. It depends on the scale of the loss, so tune it in decades; the authors take 1000 up to 8/255, 5000 from
            10/255 to 20/255 and 10000 from 22/255.
        track_statistics: whether the pass of the points, which are noisy, moves BatchNorm's running statistics as in the
            authors' code; it normalises by its batch in any case.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if lmbda is negative, or the attack has another norm than linf.
    """

    inner_objective = "ce_hard"

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 1000.0,
        track_statistics: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if lmbda < 0:
            raise ValueError(f"lmbda={lmbda} must be at least 0")
        if self.attack.norm != "linf":
            raise ValueError(
                f"{type(self).__name__} draws points of the linf ball and attack.norm is {self.attack.norm!r}: choose linf"
            )
        self.lmbda, self.track_statistics = lmbda, track_statistics

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> TripleExample:
        example = self.clean(batch)
        x_adv = self.run_attack(example, eps).x_adv
        x = wide(example.x)
        radius, draws = radius_of(self, x, eps), draws_of(self, "elle", x.device)
        first, second = (x + radius * (2 * draws.uniform(x) - 1) for _ in range(2))
        share = draws.uniform(x[:, :1, :1, :1])
        points = torch.stack([first, second, (1 - share) * first + share * second], 1)
        dtype = example.x.dtype
        return TripleExample(example.x, example.y, example.index, x_adv.to(dtype), points.to(dtype), share.flatten())

    def loss(self, example: TripleExample) -> Tensor:
        loss = F.cross_entropy(self(example.x_adv), example.y)
        with nullcontext() if self.track_statistics else untracked(self.net):
            logits = self(example.points.transpose(0, 1).flatten(0, 1))
        losses = hard_cross_entropy(wide(logits), hard(example.y).repeat(3)).view(3, -1)
        errors = linearity_error(*losses, example.share)
        if example.errors is None:
            example.errors = errors.detach()
        return loss + self.weight() * errors.mean()

    def weight(self) -> float | Tensor:
        """Of the linearity error in this step."""
        return self.lmbda
