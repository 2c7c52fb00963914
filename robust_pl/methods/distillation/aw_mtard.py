"""AW-Net's training with two teachers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...functional.distillation import KLReduction
from ...nets.aw_net import AWNet
from ..base import OptimizerFactory
from ..schedules import Schedule
from .mtard import MTARD, TwiceTaughtExample


class AWMTARD(MTARD):
    """Training of an AW-Net (Wei, Zhao, Li 2023, arXiv 2306.03430): MTARD, whose student knows what is attacked.

    MTARD's loss, see :class:`MTARD`, where clean images go through the clean BatchNorms alone (p = 0) and attacked ones through
    the adversarial ones alone (p = 1), and their filters are scaled as the router says; plus ``router_weight`` times
    BCE(p(x), 0) + BCE(p(x_adv), 1), so that the router learns p. The attack meets the deployed network, which mixes by p.

    A reconstruction: that AW-Net mixes BatchNorms and is trained end to end by MTARD is the paper's; the router's loss, its
    weight and how the attack sees the network are ours, and we had no figures of the paper to compare with.

    The router sees clean and attacked images as one batch. Its pass is not counted, it is small. On several processes plain
    ``ddp`` will do: every weight has a part in every step.

    Cost: the attack's passes, two forward and two backward passes, and one forward pass of each teacher: 12 + 12 and 2 with
    PGD-10.

    Args:
        net: an AW-Net.
        router_weight: weight of the router's own loss.
        teacher: see :class:`MTARD`, and so all others.

    Raises:
        TypeError: if the network is no AWNet.
        ValueError: if ``router_weight`` is negative, or the attack is not in eval mode.
    """

    def __init__(
        self,
        net: AWNet,
        teacher: nn.Module,
        clean_teacher: nn.Module,
        attack: Attack | None = None,
        router_weight: float = 0.1,
        balance_rate: float = 0.025,
        beta: float = 1.0,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(
            net,
            teacher,
            clean_teacher,
            attack,
            balance_rate,
            beta,
            kl_reduction=kl_reduction,
            optimizer=optimizer,
            schedule=schedule,
            weights=weights,
            num_classes=num_classes,
        )
        if not isinstance(net, AWNet):
            raise TypeError(f"net is a {type(net).__name__}: AWMTARD trains an AW-Net, AWNet(net=...)")
        if router_weight < 0:
            raise ValueError(f"router_weight={router_weight} must be at least 0")
        if self.attack.bn_mode != "eval":
            raise ValueError(
                f"attack.bn_mode={self.attack.bn_mode!r} would normalise mixed images by their own statistics: choose 'eval'"
            )
        self.router_weight = router_weight

    def loss(self, example: TwiceTaughtExample) -> Tensor:
        # One batch: normalised by batches of their own, the router would learn to tell batches and not images.
        clean, attacked = self.net.signals(torch.cat([example.x, example.x_adv])).chunk(2)
        logits_adv = self.net.routed(example.x_adv, attacked, share=1.0)
        logits = self.net.routed(example.x, clean, share=0.0)
        p, p_adv = self.net.share(clean), self.net.share(attacked)
        with torch.autocast(p.device.type, enabled=False):  # which refuses this loss in half precision
            of_router = F.binary_cross_entropy(p, torch.zeros_like(p)) + F.binary_cross_entropy(p_adv, torch.ones_like(p_adv))
        # Also with a weight of 0, so that every weight has a gradient.
        return self.distil(example, logits_adv, logits) + self.router_weight * of_router
