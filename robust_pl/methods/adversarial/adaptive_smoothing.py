"""Adaptive smoothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.draws import StreamDraws, seed_from
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.problem import Objective
from ...functional.losses import cross_entropy, hard
from ...nets.mixed import MixedClassifier
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule

_STRENGTHS = (0.4, 1.1)
_FOOLING = 0.4


class AdaptiveSmoothing(Method):
    """Adaptive smoothing (Bai, Anderson, Kim, Sojoudi 2023, arXiv 2301.12554): train the network that mixes two others.

    The accurate and the robust network stay as they are. The loss takes clean and attacked images in one batch and is
    ``bce * BCE + ce * CE + product * BCE * CE`` of each, where BCE asks gamma to tell attacked images (1) from clean ones (0)
    and CE is that of the mix in train mode. The attack maximises ``(1 - w) * CE + w * BCE`` through the mixing network, with a
    w ~ U(0, 0.4) and a radius ``eps * U(0.4, 1.1)`` for each image. An attack that names an objective of its own keeps it.

    Evaluate with an attack on the margin, or AutoAttack, beside PGD: flattening the robust network's softmax (``robust_scale``
    below 1) weakens attacks on cross-entropy more than it strengthens the mix.

    The authors also draw the number of steps and a momentum, and attack with APGD as well; here the attack is the one given.

    Cost: the attack's passes and two forward and two backward passes a step, each through both networks; those of the step end
    at the mixing network. 22 + 22 with PGD-20.

    Args:
        net: both networks and the mixing one.
        attack: PGD-20 by default; give it no ``step_size``, so that its steps follow each image's radius.
        bce: weight of the cross-entropy of the decision.
        ce: weight of the cross-entropy of the mix.
        product: weight of their product, image by image.
        optimizer: AdamW with 5e-5 by default.
        schedule: see :class:`Method`, and so all others.

    Raises:
        ValueError: if a weight is negative, or the network has a fixed alpha and the run is to train it.
        TypeError: if the network is no MixedClassifier.
    """

    def __init__(
        self,
        net: MixedClassifier,
        attack: Attack | None = None,
        bce: float = 1.5,
        ce: float = 0.0,
        product: float = 0.3,
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=5e-5, weight_decay=1e-5),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not isinstance(net, MixedClassifier):
            raise TypeError(f"net is a {type(net).__name__}: AdaptiveSmoothing trains the mixing network of a MixedClassifier")
        for name, value in (("bce", bce), ("ce", ce), ("product", product)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        self.bce, self.ce, self.product = bce, ce, product

    @staticmethod
    def default_attack() -> PGD:
        return PGD(steps=20)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.net.mixer is None:
            raise ValueError(
                f"net.alpha={self.net.alpha} is fixed, so that there is nothing to train: leave alpha out, or run "
                "robust-pl test instead of fit"
            )

    @cached_property
    def with_decision(self) -> _WithDecision:
        """What is attacked, made once, since an attack looks at a network that it has not seen before."""
        return _WithDecision(self.net)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        """Attack the mix together with its decision."""
        x = batch[0]
        draws = StreamDraws(seed_from(self.attack.seed, "mix", self.global_rank, self.attack.calls), x.device)
        uniform = draws.uniform(x.new_empty((2, len(x), 1, 1), dtype=torch.float32))
        if eps is None:
            low, high = _STRENGTHS
            eps = self.attack.eps * (low + (high - low) * uniform[0].unsqueeze(-1))
        if self.attack.objective is not None:
            return super().craft(batch, eps)
        objective = Objective(_mix_and_decision, (batch[1], _FOOLING * uniform[1].flatten()))
        example = self.clean(batch)
        attacked = self.attack.run(
            self.with_decision,
            x,
            hard(example.y),  # mixed labels would not fit the last column
            eps=eps,
            objective=objective,
            rank=self.global_rank,
            careful=x.device.type == "cpu",
        )
        return replace(example, x_adv=attacked.x_adv.to(x.dtype))

    def loss(self, example: Example) -> Tensor:
        # One batch, since the mixing network normalises its decision by it.
        out, gamma = self.net.parts(torch.cat([example.x, example.x_adv]))
        attacked = torch.cat([torch.zeros_like(gamma[: len(example.x)]), torch.ones_like(gamma[len(example.x) :])])
        decision = F.binary_cross_entropy_with_logits(gamma, attacked, reduction="none")
        mixed = cross_entropy(out, torch.cat([example.y, example.y]))
        return (self.bce * decision + self.ce * mixed + self.product * decision * mixed).mean()


class _WithDecision(nn.Module):
    """The mix and, in a last column, gamma: (B, K + 1)."""

    def __init__(self, net: MixedClassifier) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out, gamma = self.net.parts(x)
        return torch.cat([out, gamma.unsqueeze(1)], 1)


def _mix_and_decision(columns: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """What the training attack maximises: a wrong class, and to be taken for clean, (B,)."""
    out, gamma = columns[:, :-1], columns[:, -1]
    fooling = F.binary_cross_entropy_with_logits(gamma, torch.ones_like(gamma), reduction="none")
    return (1 - share) * cross_entropy(out, y) + share * fooling
