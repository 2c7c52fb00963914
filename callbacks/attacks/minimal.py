"""The base of attacks that look for the smallest perturbation."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...functional.geometry import Norm
from ...functional.ratio import Ratio
from .base import Attack
from .checks import Number
from .prepare import BNMode
from .problem import Problem

UNBOUNDED = Ratio("inf")


class MinimalNormAttack(Attack):
    """An attack that looks for the smallest perturbation that changes the prediction, instead of the worst one in a ball.

    A subclass defines :meth:`find`. With ``eps=None`` the smallest perturbation found is returned, whatever its size. With a
    radius the attack has succeeded where that size is at most eps, and gives the clean image back elsewhere; one run is thus
    an accuracy for every radius.

    Args:
        eps: None, or a radius, see :class:`Attack`.
        norm: in which size is measured.
        targeted: see :class:`Attack`.
        bn_mode: see :class:`Attack`.
        seed: see :class:`Attack`.
    """

    def __init__(
        self,
        eps: Number | Tensor | None = None,
        *,
        norm: Norm = "l2",
        targeted: bool = False,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(0.0 if eps is None else eps, norm=norm, targeted=targeted, bn_mode=bn_mode, seed=seed)
        if eps is None:
            self.eps = UNBOUNDED

    @abstractmethod
    def find(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        """The nearest image (B, C, H, W) in the box that fools the network, and ``x`` where none was found.

        ``problem.eps`` may be infinite: it is no more than a hint, and :meth:`perturb` compares with it.
        """

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        x_adv = self.find(problem, x, y)
        eps = torch.as_tensor(problem.eps, device=x.device, dtype=x.dtype).reshape(-1)
        inside = problem.size(x_adv) <= eps
        return torch.where(inside.view(-1, 1, 1, 1), x_adv, x)
