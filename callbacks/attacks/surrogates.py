"""Small networks that learn to answer like the network under attack, from the answers that were paid for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import Memory

# Convolutions of the first, second, ... surrogate, half of the public code's, whose cells each hold several.
DEPTHS = (5, 3, 4, 2, 6, 7)
LEAST_STEPS = 30
# Share of the logits' variance that may be left: 2 of about 20 in the public code.
FIT_TO = 0.1


class Surrogates:
    """Convolutional networks of different depths, fitted one after the other to the logits in a :class:`Memory`.

    Args:
        count: how many.
        width: channels of the first layer.
        memory: what they learn from; its queries so far give the scale of the logits.
        seed: of weights and batches.
    """

    def __init__(self, count: int, width: int, memory: Memory, seed: int) -> None:
        images, logits = memory.images, memory.logits[: len(memory)]
        # Networks differ in the scale of their logits, and the step size should not.
        self.scale = logits.std(correction=0).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            depths = [DEPTHS[i % len(DEPTHS)] for i in range(count)]
            self.nets = [build(depth, width, images.shape[1:], logits.shape[1]).to(images.device) for depth in depths]
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3) for net in self.nets]
        self.generator = torch.Generator().manual_seed(seed)

    def fit(self, memory: Memory, steps: int, batch_size: int) -> None:
        """At most ``steps`` batches for each network; fewer once it answers well enough."""
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            for step in range(steps):
                images, logits = memory.batch(batch_size, self.generator)
                optimizer.zero_grad()
                loss = F.mse_loss(self._answer(net, images), logits) / self.scale**2
                loss.backward()
                optimizer.step()
                if step + 1 >= LEAST_STEPS and loss.item() < FIT_TO:
                    break

    def logits(self, images: Tensor) -> list[Tensor]:
        """What each network answers, (n, K)."""
        with torch.no_grad():
            return [self._answer(net, images.float()) for net in self.nets]

    def gradients(self, images: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Gradient of ``loss``, which maps logits (n, K) to (n,), with respect to ``images`` through each network."""
        images = images.detach().float().requires_grad_()
        return [torch.autograd.grad(loss(self._answer(net, images)).sum(), images)[0] for net in self.nets]

    def _answer(self, net: nn.Module, images: Tensor) -> Tensor:
        # Autocast is the caller's choice for the network under attack, not for these.
        with torch.autocast(images.device.type, enabled=False):
            return net(images) * self.scale


def build(depth: int, width: int, shape: torch.Size, classes: int) -> nn.Sequential:
    """``depth`` convolutions on images (C, H, W) in [0, 1]; after each third of them half the size and twice the channels."""
    channels, height, width_of_image = shape
    stride = min(max(min(height, width_of_image) // 56, 1), 4)
    layers: list[nn.Module] = [Centre(), nn.Conv2d(channels, width, 2 * stride + 1, stride, stride)]
    before = width
    for i in range(1, depth):
        after = width * 2 ** (i * 3 // depth)
        layers += [nn.GroupNorm(1, before), nn.ELU(), nn.Conv2d(before, after, 3, after // before, 1)]
        before = after
    layers += [nn.GroupNorm(1, before), nn.ELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * before, classes)]
    return nn.Sequential(*layers)


class Centre(nn.Module):
    """From [0, 1] to [-2, 2]."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * x - 2
