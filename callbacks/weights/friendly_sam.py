"""Friendly SAM: only what a batch's gradient has beside the mean gradient perturbs the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .perturbation import gradients_of
from .sam import SAM


class FriendlySAM(SAM):
    """Friendly SAM (Li et al. 2024, arXiv 2403.12350): the offset goes along d = g - sigma * m.

    m = lmbda * m + (1 - lmbda) * g, updated after its use, tracks the mean gradient; the first step, with m = g, is one of SAM.
    With an attack, g is the gradient of the adversarial loss: that use is ours and not the paper's. Cost: one more forward and
    backward pass a step, and a copy of the gradient, which is kept in checkpoints.

    Args:
        rho: length of the offset; the authors use 0.2 on CIFAR-100.
        sigma: share of the mean gradient that is taken away; 0 is SAM.
        lmbda: decay of the mean gradient in [0, 1); 0.6 in the authors' CIFAR script.
        adaptive: see :class:`SAM`.
        start_epoch: see :class:`WeightPerturbation`.

    Raises:
        ValueError: if lmbda is not in [0, 1) or rho not positive.
    """

    def __init__(
        self, rho: float = 0.2, sigma: float = 1.0, lmbda: float = 0.6, adaptive: bool = False, start_epoch: int = 0
    ) -> None:
        super().__init__(rho, adaptive, start_epoch)
        if not 0 <= lmbda < 1:
            raise ValueError(f"lmbda={lmbda} is a decay: choose from [0, 1)")
        self.sigma, self.lmbda = sigma, lmbda
        self._mean: dict[str, Tensor] = {}

    def directions(self, parameters: dict[str, Parameter]) -> list[Tensor]:
        found = []
        for (name, parameter), gradient in zip(parameters.items(), gradients_of(parameters), strict=True):
            mean = self._mean.get(name)
            if mean is None:
                self._mean[name] = gradient.clone()
                found.append(gradient)
                continue
            if mean.device != parameter.device:  # from a checkpoint
                mean = self._mean[name] = mean.to(parameter.device)
            found.append(gradient - self.sigma * mean)
            torch.lerp(mean, gradient, 1 - self.lmbda, out=mean)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mean = dict(state_dict["mean"])
