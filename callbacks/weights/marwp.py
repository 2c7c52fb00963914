"""m-ARWP: mixed and adaptive random weight perturbation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .perturbation import gradients_of
from .rwp import RWP, per_filter


class MARWP(RWP):
    """m-ARWP (Li et al. 2024, arXiv 2404.00357): RWP with less noise where gradients are large, and half of L(w).

    The noise of filter j is divided by sqrt(1 + eta * s_j), where s_j = beta * s_j + sum g^2 over the filter, g being the
    gradient at the perturbed weights. The authors' code takes the two gradients from two mini-batches in turn, so that one
    optimizer step sees both; here both see the examples of the step. BatchNorm's running statistics move in the clean pass
    alone. Cost: one more forward and backward pass a step; none with ``mix=1``, which is the authors' ARWP but for their sigma,
    which grows elevenfold over the run by half a cosine, from 0.001.

    Args:
        sigma: size of the noise; 0.015 in the authors' CIFAR-100 script.
        mix: weight of the gradient at the perturbed weights, see :class:`RWP`.
        eta: how strongly large gradients lower the noise.
        beta: decay of the squared gradients in [0, 1).
        seed: of the noise.
        start_epoch: see :class:`WeightPerturbation`.

    Raises:
        ValueError: if eta is negative, or beta not in [0, 1).
    """

    def __init__(
        self,
        sigma: float = 0.015,
        mix: float = 0.5,
        eta: float = 0.1,
        beta: float = 0.99,
        seed: int = 0,
        start_epoch: int = 0,
    ) -> None:
        super().__init__(sigma, mix, seed, start_epoch)
        if eta < 0:
            raise ValueError(f"eta={eta} must be at least 0")
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} is a decay: choose from [0, 1)")
        self.eta, self.beta = eta, beta
        # Sums of squares over filters are all that the noise asks for, and are small enough for a checkpoint.
        self._squares: dict[str, Tensor] = {}

    def scale(self, name: str, noise: Tensor) -> Tensor:
        squares = self._squares.get(name)
        if squares is None:
            return super().scale(name, noise)
        return (1 + self.eta * squares.to(noise.device)).rsqrt()

    @torch.no_grad()
    def observe(self, parameters: dict[str, Parameter]) -> None:
        for name, gradient in zip(parameters, gradients_of(parameters), strict=True):
            new = per_filter(gradient.square())
            old = self._squares.get(name)
            self._squares[name] = new if old is None else self.beta * old.to(new.device) + new

    def state_dict(self) -> dict[str, Any]:
        return {"squares": self._squares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._squares = dict(state_dict["squares"])
