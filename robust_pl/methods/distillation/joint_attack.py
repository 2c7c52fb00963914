"""The attack that looks for where student and teacher disagree most, with gradients through both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.ledger import Attacked
from ...callbacks.attacks.problem import Objective
from ...functional.losses import hard, kl_divergence
from ...nets.teacher import Teacher
from ..example import Example


def check_precision(teacher: nn.Module) -> None:
    """Refuse a teacher through which no attack gets.

    Raises:
        ValueError: if it computes in float16.
    """
    if isinstance(teacher, Teacher) and teacher.precision == "float16":
        raise ValueError(
            "teacher.precision='float16' rounds small gradients of pixels to 0, and the attack goes through the teacher: "
            "choose bfloat16 or float32"
        )


def attack_jointly(
    attack: Attack, both: StudentAndTeacher, example: Example, eps: Tensor | None = None, rank: int = 0
) -> Attacked:
    """Maximise KL(teacher || student) at the attacked pixels; what the attack calls a pass is one of both networks.

    Args:
        attack: of the training, without an objective of its own.
        both: the networks; make it once, since an attack looks at a network that it has not seen before.
        example: what is attacked.
        eps: radius of each sample (B, 1, 1, 1), or that of the attack.
        rank: of the process.
    """
    return attack.run(
        both,
        example.x,
        hard(example.y),  # mixed labels would not fit twice as many columns
        eps=eps,
        objective=Objective(disagreement),
        rank=rank,
        careful=example.x.device.type == "cpu",
    )


class StudentAndTeacher(nn.Module):
    """Logits of the student and, behind them, of the teacher: (B, 2K).

    Each is shifted, which no softmax sees, so that the largest is always one of the student's: whether a sample is fooled, for
    an attack that asks, is then a matter of the student.

    Args:
        student: maps pixels (B, C, H, W) to logits (B, K).
        teacher: likewise; its parameters get no gradient, and are in no need of one.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        student, teacher = self.student(x), self.teacher(x)
        low, high = student.detach().amin(1, keepdim=True), teacher.detach().amax(1, keepdim=True)
        return torch.cat([student - low, teacher - high - 1], 1)


def disagreement(columns: Tensor) -> Tensor:
    """KL(teacher || student) of each sample, (B,), from logits of both, (B, 2K)."""
    student, teacher = columns.chunk(2, 1)
    return kl_divergence(student, teacher)
