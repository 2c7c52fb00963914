"""How much a classifier's loss can rise when the weight of one of its modules moves a little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Criticality:
    """Module robust criticality (Zhu et al. 2023, RiFT, arXiv 2308.02533): the rise of the loss within a ball of weights.

    MRC(m) = max over ||d|| <= radius * ||w_m|| of L(w_m + d) - L(w_m), on fixed adversarial samples, approximated as in the
    authors' code: gradient ascent on that weight alone, batch after batch; after each epoch d is projected back (Frobenius
    norm) and the loss taken; the largest counts. It may come out below 0 where every ascent overshot.

    Args:
        radius: of the ball, relative to the norm of the weight.
        epochs: of the ascent. Each costs two forward and one backward pass a sample and module.
        lr: step of the ascent.
        batch_size: samples a step.

    Raises:
        ValueError: if an argument is out of range.
    """

    radius: float = 0.1
    epochs: int = 10
    lr: float = 1.0
    batch_size: int = 512

    def __post_init__(self) -> None:
        for name, least in (("radius", 0), ("epochs", 1), ("lr", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"criticality.{name}={getattr(self, name)} must be at least {least}")

    def loss(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, device: torch.device) -> Tensor:
        """Mean cross-entropy over all samples, a 0-dim tensor."""
        with torch.no_grad():
            batches = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
            sums = [F.cross_entropy(net(x.to(device)), y.to(device), reduction="sum") for x, y in batches]
        return torch.stack(sums).sum() / len(x)

    def highest_loss(self, net: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The largest mean loss that the ascent on ``weight`` meets, a 0-dim tensor.

        The weight is put back bit for bit. Holds one copy of it and no other of the network.

        Args:
            net: maps pixels to logits; in eval mode, with all parameters but ``weight`` frozen by the caller.
            weight: a parameter of ``net``, moved in place.
            x: adversarial pixels (N, C, H, W), on any device.
            y: their labels (N,).
        """
        before, wanted = weight.detach().clone(), weight.requires_grad
        limit = self.radius * before.norm()
        highest = torch.full((), -torch.inf, dtype=weight.dtype, device=weight.device)
        try:
            weight.requires_grad_(True)
            for _ in range(self.epochs):
                for some, labels in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
                    loss = F.cross_entropy(net(some.to(weight.device)), labels.to(weight.device))
                    (gradient,) = torch.autograd.grad(loss, weight)
                    with torch.no_grad():
                        weight.add_(gradient, alpha=self.lr)
                with torch.no_grad():
                    moved = weight - before
                    weight.copy_(before + moved * (limit / moved.norm()).clamp(max=1))
                # An ascent that overflows has found a loss as large as can be.
                found = self.loss(net, x, y, weight.device).nan_to_num(nan=torch.inf)
                highest = torch.maximum(highest, found.to(highest.dtype))
        finally:
            weight.requires_grad_(wanted)
            with torch.no_grad():
                weight.copy_(before)
        return highest


def weighted_modules(net: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a network by name; of modules that share a weight the first."""
    found: dict[str, nn.Module] = {}
    weights: set[int] = set()
    for name, module in net.named_modules():
        if isinstance(module, KINDS) and isinstance(module._parameters.get("weight"), nn.Parameter):
            if id(module.weight) not in weights:
                found[name] = module
            weights.add(id(module.weight))
    return found
