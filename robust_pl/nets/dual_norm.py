"""Two BatchNorms in the place of one: clean and adversarial features follow different statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Weight = float | Tensor


class Routing:
    """How much of the adversarial BatchNorm the layers of one network take; all of them share this object.

    At first, and outside of :meth:`use` and :meth:`split`, samples go through the clean one alone.
    """

    def __init__(self) -> None:
        self.weight: Weight = 0.0
        self.clean_first: int | None = None

    @contextmanager
    def use(self, weight: Weight) -> Iterator[None]:
        """Mix the outputs: ``weight`` times the adversarial one, the rest the clean one.

        Args:
            weight: 0.0 and 1.0 run one of the two alone, so that the other one's statistics stay; a number between mixes both,
                a tensor (B,) in [0, 1] mixes them for each sample, and gradients flow into it.

        Raises:
            ValueError: if a number is outside of [0, 1], or the tensor is not (B,).
        """
        if isinstance(weight, Tensor) and weight.dim() != 1:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: give one number a sample, (B,)")
        if not isinstance(weight, Tensor) and not 0 <= weight <= 1:
            raise ValueError(f"weight={weight} is the share of the adversarial BatchNorm: choose from [0, 1]")
        with self._set(weight, None):
            yield

    @contextmanager
    def split(self, clean_first: int) -> Iterator[None]:
        """The first samples of a batch go through the clean BatchNorm, the others through the adversarial one.

        Each part is normalised by its own statistics, also in train mode, as AdvProp does with [x; x_adv] (Xie et al. 2020,
        arXiv 1911.09665).

        Args:
            clean_first: how many samples are clean.
        """
        if clean_first < 0:
            raise ValueError(f"clean_first={clean_first} must be at least 0")
        with self._set(0.0, clean_first):
            yield

    @contextmanager
    def _set(self, weight: Weight, clean_first: int | None) -> Iterator[None]:
        before = self.weight, self.clean_first
        self.weight, self.clean_first = weight, clean_first
        try:
            yield
        finally:
            self.weight, self.clean_first = before


class DualBatchNorm(nn.Module):
    """Two BatchNorms, ``clean`` and ``adv``, each with its own affine parameters and running statistics.

    They are ordinary layers: averages of weights, checkpoints and ``SyncBatchNorm.convert_sync_batchnorm`` treat them as any.
    A layer that also activates, such as timm's BatchNormAct2d, is mixed after its activation.

    Args:
        norm: becomes ``clean``; ``adv`` starts as its copy.
        routing: shared with the other layers of the network.
    """

    def __init__(self, norm: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.clean, self.adv = norm, deepcopy(norm)
        self.routing = routing

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        weight, first = self.routing.weight, self.routing.clean_first
        if first is not None:
            parts = [norm(part) for norm, part in ((self.clean, z[:first]), (self.adv, z[first:])) if len(part)]
            return torch.cat(parts)
        if not isinstance(weight, Tensor):
            if weight in (0, 1):
                return self.adv(z) if weight else self.clean(z)
            return weight * self.adv(z) + (1 - weight) * self.clean(z)
        clean, adv = self.clean(z), self.adv(z)
        weight = weight.to(adv.dtype).view(-1, *[1] * (z.dim() - 1))
        # Not a lerp: at weights of 0 and 1 this is either output, bit for bit.
        return weight * adv + (1 - weight) * clean


def dual_batch_norm(net: nn.Module) -> Routing:
    """Replace every BatchNorm of a network by a :class:`DualBatchNorm`, in place; both halves start with its weights.

    Args:
        net: any network with BatchNorm, which may hold trained weights already.

    Returns:
        What all of them share: ``with routing.use(1.0): net(x)``.

    Raises:
        ValueError: if there is no BatchNorm, or they are dual already.
    """
    if any(isinstance(module, DualBatchNorm) for module in net.modules()):
        raise ValueError(f"{type(net).__name__} has dual BatchNorms already: convert a network once")
    routing = Routing()
    found = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]
    if not found or found == [""]:
        raise ValueError(f"{type(net).__name__} has no BatchNorm inside that a dual one could replace: choose another net")
    for name in found:
        net.set_submodule(name, DualBatchNorm(net.get_submodule(name), routing))
    return routing


@contextmanager
def settled(net: nn.Module) -> Iterator[None]:
    """Dual BatchNorms normalise by their running statistics and leave them as they are, whatever the network's mode.

    Mixed samples belong to neither half, and would spoil the statistics of both.
    """
    norms = [half for m in net.modules() if isinstance(m, DualBatchNorm) for half in (m.clean, m.adv)]
    modes = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.train(False)
        yield
    finally:
        for norm, training in zip(norms, modes, strict=True):
            norm.train(training)
