"""SAM: the gradient is taken where the loss is highest near the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

from .perturbation import Displaced, WeightPerturbation, differentiated, gradients_of

_TINY = 1e-12


class SAM(WeightPerturbation):
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412): the gradient at w + rho * g / ||g|| moves w.

    The norm is that of all parameters together. With ``adaptive`` the offset is rho * w^2 g / || |w| g ||, as in ASAM (Kwon et
    al. 2021, arXiv 2102.11600). The attacked images of the first pass serve the second, too. BatchNorm's running statistics
    move in the first pass alone, and weight decay acts on w. Cost: one more forward and backward pass a step.

    Args:
        rho: length of the offset; 0.05 on CIFAR-10, 0.1 to 0.2 on CIFAR-100.
        adaptive: measure the offset relative to each weight.
        start_epoch: see :class:`WeightPerturbation`.

    Raises:
        ValueError: if rho is not positive.
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False, start_epoch: int = 0) -> None:
        super().__init__(start_epoch)
        if rho <= 0:
            raise ValueError(f"rho={rho} must be above 0")
        self.rho, self.adaptive = rho, adaptive

    def directions(self, parameters: dict[str, Parameter]) -> list[Tensor]:
        """Which way to go from each parameter; the length does not matter."""
        return gradients_of(parameters)

    @torch.no_grad()
    def offsets(self, parameters: dict[str, Parameter]) -> list[Tensor]:
        """What is added to each parameter."""
        directions, weights = self.directions(parameters), [p.detach() for p in parameters.values()]
        scaled = directions
        if self.adaptive:
            scaled = [w.abs() * d for w, d in zip(weights, directions, strict=True)]
            directions = [w.square() * d for w, d in zip(weights, directions, strict=True)]
        length = torch.stack(torch._foreach_norm(scaled)).norm()
        # Where all directions cancel, what is left is rounding noise, and normalising it would go anywhere.
        factor = torch.where(length > _TINY, self.rho / (length + _TINY), torch.zeros_like(length))
        return [factor.to(d.dtype) * d for d in directions]

    def step(
        self,
        module: LightningModule,
        gradients: Callable[[], Any],
        gradients_again: Callable[[bool], None],
        update: Callable[[Any], None],
    ) -> None:
        loss = gradients()
        parameters = differentiated(module)
        displaced = Displaced(list(parameters.values()), self.offsets(parameters))
        try:
            gradients_again(False)
        finally:
            displaced.restore()
        update(loss)
