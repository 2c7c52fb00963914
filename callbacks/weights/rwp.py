"""RWP: random weight perturbation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from ..attacks.draws import seed_from
from .perturbation import Displaced, WeightPerturbation, differentiated


class RWP(WeightPerturbation):
    """Random weight perturbation (Li et al. 2022, arXiv 2211.11489): the gradient is that of E L(w + e), or mixed with L(w).

    The noise of an output filter w_j is Gaussian with a standard deviation of sigma * ||w_j|| in each entry; one-dimensional
    tensors count as one filter. Gradient: mix * grad L(w + e) + (1 - mix) * grad L(w). With ``mix=1`` there is one pass, at
    w + e, and nothing is added to the cost of a step but the noise. Else there are two, one more forward and backward pass, on
    the same examples; the authors run them at the same time on two devices, each with examples of its own. The attack runs at
    w: that use is ours. The noise is a function of the seed and the step, the same on all processes.

    Args:
        sigma: size of the noise; 0.01 in the authors' CIFAR-100 script.
        mix: weight of the gradient at the perturbed weights in (0, 1].
        seed: of the noise.
        start_epoch: see :class:`WeightPerturbation`.

    Raises:
        ValueError: if sigma is not positive or mix not in (0, 1].
    """

    tracks_perturbed: bool = False
    """Whether the second pass of a mixed step moves BatchNorm's running statistics."""

    def __init__(self, sigma: float = 0.01, mix: float = 1.0, seed: int = 0, start_epoch: int = 0) -> None:
        super().__init__(start_epoch)
        if sigma <= 0:
            raise ValueError(f"sigma={sigma} must be above 0")
        if not 0 < mix <= 1:
            raise ValueError(f"mix={mix} is the weight of the perturbed gradient: choose from (0, 1]")
        self.sigma, self.mix, self.seed = sigma, mix, seed
        self._displaced: Displaced | None = None

    def around_loss(self, module: LightningModule) -> AbstractContextManager[None]:
        if self.mix == 1:
            # Until the backward pass is over, which needs the weights as the forward pass saw them.
            self._displaced = self._displace({name: p for name, p in module.named_parameters() if p.requires_grad}, module)
        return nullcontext()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def scale(self, name: str, noise: Tensor) -> Tensor:
        """What the noise of a parameter is multiplied with beside sigma and the norms of its filters, of (filters, 1, ...)."""
        return torch.ones((), device=noise.device, dtype=noise.dtype)

    def observe(self, parameters: dict[str, Parameter]) -> None:
        """Look at the gradients at the perturbed weights."""

    def step(
        self,
        module: LightningModule,
        gradients: Callable[[], Any],
        gradients_again: Callable[[bool], None],
        update: Callable[[Any], None],
    ) -> None:
        loss = gradients()
        if self.mix < 1:
            self._mix(module, gradients_again)
        else:
            self.observe(differentiated(module))
        update(loss)

    @torch.no_grad()
    def _mix(self, module: LightningModule, gradients_again: Callable[[bool], None]) -> None:
        parameters = differentiated(module)
        clean = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        self._displaced = self._displace(parameters, module)
        try:
            with torch.enable_grad():
                gradients_again(self.tracks_perturbed)
        finally:
            self._restore()
        self.observe(differentiated(module))
        for name, parameter in parameters.items():
            perturbed = parameter.grad if parameter.grad is not None else torch.zeros_like(clean[name])
            parameter.grad = self.mix * perturbed + (1 - self.mix) * clean[name]

    @torch.no_grad()
    def _displace(self, parameters: dict[str, Parameter], module: LightningModule) -> Displaced:
        step = module.trainer.global_step
        device = next(iter(parameters.values())).device
        generator = torch.Generator(device).manual_seed(seed_from(self.seed, "rwp", step))
        offsets = []
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device=device)
            offsets.append(noise * (self.sigma * filter_norms(parameter)) * self.scale(name, noise))
        return Displaced(list(parameters.values()), offsets)

    def _restore(self) -> None:
        if self._displaced is not None:
            self._displaced.restore()
            self._displaced = None


def filter_norms(tensor: Tensor) -> Tensor:
    """Norm of each output filter, (filters, 1, ...); of the whole tensor, (1,), where it has one dimension."""
    return per_filter(tensor.detach().square()).sqrt()


def per_filter(tensor: Tensor) -> Tensor:
    """Sum over each output filter, of (filters, 1, ...), or over a tensor of one dimension, (1,)."""
    if tensor.dim() < 2:
        return tensor.sum().reshape(1)
    return tensor.flatten(1).sum(1).view(-1, *[1] * (tensor.dim() - 1))
