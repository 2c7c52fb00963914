"""IGDM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...functional.losses import kl_divergence

if TYPE_CHECKING:
    from .base import Distillation


class IGDM:
    """Indirect gradient distillation (Lee et al., arXiv 2312.03286), an addition to the loss of a :class:`Distillation`.

    alpha * (epoch / epochs) * KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d))) with d = x_adv - x: differences
    stand for the input gradients of teacher and student. x - d may leave [0, 1], as in the authors' code. The divergence is
    reduced as the method's are; the authors take ``batchmean``.

    Cost: one forward and one backward pass of the student, one forward pass of the teacher, and one more of the teacher on
    attacked pixels where the method itself does not ask for that.

    Args:
        alpha: weight at the end of the run; the authors take 1 on CIFAR-10 and 10 on CIFAR-100.

    Raises:
        ValueError: if alpha is negative.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if alpha < 0:
            raise ValueError(f"alpha={alpha} must be at least 0")
        self.alpha = alpha

    def loss(self, method: Distillation, adv: Tensor, away: Tensor, teacher_adv: Tensor, teacher_away: Tensor) -> Tensor:
        """The term, a scalar, from logits (B, K) of student and teacher at x + d and at x - d."""
        weight = self.alpha * method.current_epoch / method.trainer.max_epochs
        return weight * method.reduce(kl_divergence(adv - away, teacher_adv - teacher_away))
