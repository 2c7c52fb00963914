"""AWP: adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

from ...nets.statistics import untracked
from .perturbation import Displaced, WeightPerturbation, differentiated

_TINY = 1e-20


class AWP(WeightPerturbation):
    """Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884): v_l = gamma * ||w_l|| * g_l / ||g_l|| a tensor.

    As in the authors' code, tensors of two or more dimensions whose name contains ``weight`` are perturbed, the optimizer steps
    while they are (so weight decay sees w + v), and v is taken away afterwards. BatchNorm's running statistics move in the
    second pass alone. Works with any method: AT-AWP, TRADES-AWP, MART-AWP. Cost: one more forward and backward pass a step,
    with the attacked images of the first, and two copies of the perturbed weights.

    Args:
        gamma: size of the perturbation of a tensor relative to its own; 0.01 for PGD-AT, 0.005 for TRADES.
        start_epoch: the authors begin TRADES-AWP after 10 epochs; see :class:`WeightPerturbation`.

    Raises:
        ValueError: if gamma is not positive.
    """

    def __init__(self, gamma: float = 0.01, start_epoch: int = 0) -> None:
        super().__init__(start_epoch)
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be above 0")
        self.gamma = gamma

    def around_loss(self, module: LightningModule) -> AbstractContextManager[None]:
        return untracked(module)

    @torch.no_grad()
    def offsets(self, parameters: list[Parameter]) -> list[Tensor]:
        """What is added to each parameter."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        lengths = torch._foreach_norm([p.detach() for p in parameters])
        factors = [self.gamma * w / (g + _TINY) for w, g in zip(lengths, torch._foreach_norm(gradients), strict=True)]
        return [factor * gradient for factor, gradient in zip(factors, gradients, strict=True)]

    def step(
        self,
        module: LightningModule,
        gradients: Callable[[], Any],
        gradients_again: Callable[[bool], None],
        update: Callable[[Any], None],
    ) -> None:
        loss = gradients()
        perturbed = [p for name, p in differentiated(module).items() if "weight" in name and p.dim() > 1]
        if not perturbed:
            raise ValueError("AWP finds no weights: no tensor of two or more dimensions is named weight; use SAM")
        displaced = Displaced(perturbed, self.offsets(perturbed))
        try:
            gradients_again(True)
        except BaseException:
            displaced.restore()
            raise
        displaced.restore_and_keep(lambda: update(loss))
