"""What one would write by hand, the yardstick: PGD and PGD adversarial training with nothing around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int, random_start: bool = True) -> Tensor:
    """Linf PGD by input gradients only; the model is in eval mode and its parameters are frozen already."""
    low, high = (x - eps).clamp(min=0.0), (x + eps).clamp(max=1.0)
    x_adv = x
    if random_start:
        x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), low, high)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
) -> Tensor:
    """One step of PGD adversarial training: attack in eval mode, then learn in train mode. Returns the loss."""
    model.eval().requires_grad_(False)
    x_adv = pgd(model, x, y, eps, step_size, steps, random_start)
    model.train().requires_grad_(True)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()
