"""Adaptive feature alignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.draws import StreamDraws, seed_from
from ...callbacks.attacks.pgd import PGD
from ...nets.adaptive_dual_net import AdaptiveDualNet
from ...nets.dual_norm import settled
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


@dataclass
class AFAExample(Example):
    """A batch of the second stage.

    Args:
        strength: radius that each image was attacked with, (B, 1, 1, 1); None in the first stage.
    """

    strength: Tensor | None = None


class AFA(Method):
    """Adaptive feature alignment (arXiv 2105.15157): dual BatchNorm whose mixing weight is predicted for each image.

    A reconstruction: of the paper we had the abstract alone, which names the dual BatchNorm, the predicted weight and attacks
    of any strength. Everything else here is ours: the two stages, their losses, the predictor and all defaults.

    Stage 1 is adversarial training with dual BatchNorm: clean images go through the clean halves alone, attacked ones through
    the adversarial halves alone, which are also what the attack sees; the loss is the sum of both cross-entropies. Stage 2
    attacks each image with a radius of its own, from 0 to the attack's ``eps``, through the predictor, and trains the predictor
    with cross-entropy; running statistics stay, and so do all other weights unless ``backbone_lr`` says otherwise. Validation
    always goes through the predictor, which in stage 1 still answers 1/2.

    The schedule runs once over stage 1. In stage 2 the predictor's learning rate falls by a cosine from ``adaptive_lr`` times
    the optimizer's. On several processes choose ``trainer.strategy=ddp_find_unused_parameters_true``, since each stage leaves
    some weights unused.

    Cost: the attack's passes, and two forward and two backward passes in stage 1 or one of each in stage 2: 12 + 12 and 11 + 11
    with PGD-10.

    Args:
        net: the network with its predictor.
        attack: PGD-10 by default; give it no ``step_size``, so that its steps follow each image's radius.
        adaptive_share: share of the epochs, the last ones, that stage 2 takes.
        clean_share: share of the images of stage 2 whose radius is 0; the others' is uniform.
        strength_weight: weight of a second loss in stage 2, binary cross-entropy of the predicted weight towards radius / eps.
        adaptive_lr: learning rate of the predictor in stage 2 in units of the optimizer's.
        backbone_lr: learning rate of the other weights in stage 2 in units of the predictor's; 0 leaves them as they are.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        ValueError: if a share is outside of [0, 1], a weight or a learning rate negative, or the attack is not in eval mode.
        TypeError: if the network is no AdaptiveDualNet.
    """

    def __init__(
        self,
        net: AdaptiveDualNet,
        attack: Attack | None = None,
        adaptive_share: float = 0.1,
        clean_share: float = 0.1,
        strength_weight: float = 0.0,
        adaptive_lr: float = 0.1,
        backbone_lr: float = 0.0,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not isinstance(net, AdaptiveDualNet):
            raise TypeError(f"net is a {type(net).__name__}: AFA trains an AdaptiveDualNet, AdaptiveDualNet(net=...)")
        for name, value in (("adaptive_share", adaptive_share), ("clean_share", clean_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a share: choose from [0, 1]")
        scales = (("strength_weight", strength_weight), ("adaptive_lr", adaptive_lr), ("backbone_lr", backbone_lr))
        for name, value in scales:
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if self.attack.bn_mode != "eval":
            raise ValueError(
                f"attack.bn_mode={self.attack.bn_mode!r} would normalise mixed batches by their own statistics: choose 'eval'"
            )
        self.adaptive_share, self.clean_share = adaptive_share, clean_share
        self.strength_weight, self.backbone_lr = strength_weight, backbone_lr
        self._schedule = _TwoStages(schedule, adaptive_share, [adaptive_lr * backbone_lr, adaptive_lr])

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    @property
    def adaptive(self) -> bool:
        """Whether this epoch belongs to stage 2."""
        return self.current_epoch >= _first_stage(self.trainer.max_epochs or 0, self.adaptive_share)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> AFAExample:
        if not self.adaptive:
            with self.net.pinned(1.0):
                return AFAExample(**vars(super().craft(batch, eps)))
        strength = self._strength(batch[0]) if eps is None else eps
        return AFAExample(**vars(super().craft(batch, strength)), strength=strength)

    def loss(self, example: AFAExample) -> Tensor:
        if example.strength is not None:
            with settled(self.net), self._backbone_as_said():
                weight = self.net.weight(example.x_adv)
                with self.net.pinned(weight):
                    loss = F.cross_entropy(self(example.x_adv), example.y)
            if not self.strength_weight:
                return loss
            target = (example.strength / self.attack.eps).flatten().to(weight)
            with torch.autocast(weight.device.type, enabled=False):  # which refuses this loss in half precision
                return loss + self.strength_weight * F.binary_cross_entropy(weight, target)
        with self.net.pinned(0.0):
            clean = F.cross_entropy(self(example.x), example.y)
        with self.net.pinned(1.0):
            return clean + F.cross_entropy(self(example.x_adv), example.y)

    def trained_parameters(self) -> list[Any]:
        """The network's, and the predictor's, whose learning rates differ in stage 2."""
        return [{"params": [*self.net.net.parameters()]}, {"params": [*self.net.predictor.parameters()]}]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        strategy = self.trainer.strategy
        if stage != "fit":
            return
        if self.trainer.max_epochs in (None, -1):
            raise ValueError("AFA's stages are shares of the run: set trainer.max_epochs")
        several = isinstance(strategy, DDPStrategy) and self.trainer.world_size > 1
        if several and not strategy._ddp_kwargs.get("find_unused_parameters", False):
            raise ValueError(
                "each stage of AFA leaves some weights unused: set trainer.strategy=ddp_find_unused_parameters_true"
            )

    def _strength(self, x: Tensor) -> Tensor:
        """A radius for each image, (B, 1, 1, 1): 0 for ``clean_share`` of them, uniform up to eps for the others."""
        draws = StreamDraws(seed_from(self.attack.seed, "strength", self.global_rank, self.attack.calls), x.device)
        uniform = draws.uniform(x[:, :1, :1, :1].float())
        return self.attack.eps * ((uniform - self.clean_share) / max(1 - self.clean_share, 1e-12)).clamp_min(0)

    @contextmanager
    def _backbone_as_said(self) -> Iterator[None]:
        """No gradient for weights that stay as they are."""
        still = [p for p in self.net.net.parameters() if p.requires_grad and self.backbone_lr == 0]
        try:
            for parameter in still:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in still:
                parameter.requires_grad_(True)


def _first_stage(length: int, adaptive_share: float) -> int:
    """How many of so many epochs or steps belong to stage 1."""
    return round((1 - adaptive_share) * length)


class _TwoStages(Schedule):
    """A schedule over stage 1, and a cosine of its own over stage 2.

    Args:
        first: of stage 1; None keeps the rate constant.
        adaptive_share: share of stage 2.
        rates: where the cosine begins, for each group of parameters, in units of the optimizer's rate.
    """

    def __init__(self, first: Schedule | None, adaptive_share: float, rates: list[float]) -> None:
        self.first, self.adaptive_share, self.rates = first, adaptive_share, rates
        self.interval = "epoch" if first is None else first.interval

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        before = _first_stage(length, self.adaptive_share)
        after = max(length - before, 1)
        tables = self._first_factors(optimizer, before)

        def factor(table: list[float], rate: float) -> Callable[[int], float]:
            def at(t: int) -> float:
                return table[t] if t < before else rate * (1 + math.cos(math.pi * min((t - before) / after, 1))) / 2

            return at

        return LambdaLR(optimizer, [factor(table, rate) for table, rate in zip(tables, self.rates, strict=True)])

    def _first_factors(self, optimizer: Optimizer, length: int) -> list[list[float]]:
        """Learning rates of stage 1 in units of the optimizer's, group by group.

        Played through beforehand: a SequentialLR does not begin rightly with one that is itself a sequence.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.first is None or not length:
            return [[1.0] * length for _ in rates]
        double = SGD([{"params": [Parameter(torch.zeros(1))], "lr": rate} for rate in rates])
        scheduler = self.first.build(double, self.first.length(length))
        if any(group["momentum"] for group in double.param_groups):
            raise ValueError("the schedule moves the momentum, and AFA takes learning rates alone: set cycle_momentum to False")
        found = []
        for _ in range(length):
            found.append([group["lr"] for group in double.param_groups])
            double.step()
            scheduler.step()
        return [[lr / rate if rate else 0.0 for lr in row] for row, rate in zip(zip(*found, strict=True), rates, strict=True)]
