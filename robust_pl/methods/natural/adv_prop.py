"""AdvProp."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.losses import hard
from ...nets.dual_net import DualNet, Route, check_route
from ..base import Method, OptimizerFactory
from ..example import Example
from ..fast.crafting import draws_of, radius_of
from ..schedules import Schedule


class AdvProp(Method):
    """AdvProp (Xie et al. 2020, arXiv 1911.09665): attacked images as further training data for accuracy on clean ones.

    The loss is the mean cross-entropy over [x; x_adv] with the true labels for both, 1/2 CE(x, y) + 1/2 CE(x_adv, y), in one
    pass in which the first half is normalised by the main BatchNorms and the second by the auxiliary ones. Evaluation takes
    the main ones, see :class:`robust_pl.nets.DualNet`; it is about clean images and shifts of them, and no adversarial
    robustness is claimed. Averages of weights hold both.

    A targeted attack aims at t = (y + o) mod K with o uniform in 0, ..., K - 1, so that it may be y. Without an attack it is
    targeted PGD with one step, eps = step_size = 1/255, as published for ResNet-50; for large networks the paper takes eps of
    4/255 and five steps of 1/255. Where the attack has ``random_start=True``, a sample starts at its clean image with
    probability ``clean_start`` and at a random point of the ball else; a public port tosses one coin a batch. With ``False``
    all start at the clean image. The attack runs in eval mode through the auxiliary BatchNorms, on their running statistics;
    one public implementation attacks the main ones, ``attack_route="main"``.

    Works for networks with BatchNorm alone. On several processes each splits its own batch, and plain ``ddp`` will do.

    Cost: the attack's passes, and a forward and a backward pass on twice the batch: 3 + 3 a step with one step of the attack,
    7 + 7 with five.

    Args:
        net: a network in a DualNet.
        attack: on linf where ``clean_start`` has a meaning.
        clean_start: probability, see above; 0.2 is the paper's as we remember it.
        attack_route: BatchNorms that the attack meets, ``aux`` or ``main``.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the network is no DualNet.
        ValueError: if ``clean_start`` is no probability, the route is unknown, or the attack has no start that can be mixed.
    """

    aims = True

    def __init__(
        self,
        net: DualNet,
        attack: Attack | None = None,
        clean_start: float = 0.2,
        attack_route: Route = "aux",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_dual(net, "AdvProp")
        check_route("attack_route", attack_route)
        if not 0 <= clean_start <= 1:
            raise ValueError(f"clean_start={clean_start} is a probability: choose from [0, 1]")
        mixes = clean_start > 0 and self.attack.random_start
        if mixes and not (self.attack.takes_start and self.attack.norm == "linf" and self.attack.random_start is True):
            raise ValueError(
                f"clean_start={clean_start} mixes clean starts with uniform ones of linf, and attack is a "
                f"{type(self.attack).__name__} with norm={self.attack.norm!r} and random_start={self.attack.random_start!r}: "
                "take PGD or FGSM with linf and random_start=True, or set clean_start to 0"
            )
        if mixes and self.attack.restarts > 1:
            raise ValueError(f"attack.restarts={self.attack.restarts} would begin at the same point: set it to 1")
        self.clean_start, self.attack_route, self._mixes = clean_start, attack_route, mixes

    @staticmethod
    def default_attack() -> PGD:
        return PGD(1 / 255, 1 / 255, steps=1, targeted=True)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        example = self.clean(batch)
        aimed = replace(example, y=self._targets(example)) if self.attack.targeted else example
        with self.net.through(self.attack_route):
            attacked = self.run_attack(aimed, eps, self._start(example, eps) if self._mixes else None)
        return replace(example, x_adv=attacked.x_adv.to(example.x.dtype))

    def loss(self, example: Example) -> Tensor:
        with self.net.routing.split(len(example.x)):
            logits = self(torch.cat([example.x, example.x_adv]))
        return F.cross_entropy(logits, torch.cat([example.y, example.y]))

    def _targets(self, example: Example) -> Tensor:
        """Classes to reach, (B,)."""
        offset = draws_of(self, "target", example.x.device).few(example.x, 1).squeeze(1) * self.num_classes
        return (hard(example.y) + offset.long()) % self.num_classes

    def _start(self, example: Example, eps: Tensor | None) -> Tensor:
        x = example.x.to(torch.promote_types(example.x.dtype, torch.float32))
        draws = draws_of(self, "start", x.device)
        moves = draws.few(x, 1).view(-1, 1, 1, 1) >= self.clean_start
        return (x + moves * radius_of(self, x, eps) * (2 * draws.uniform(x) - 1)).clamp(0.0, 1.0)


def check_dual(net: object, who: str) -> None:
    """Refuse a network without auxiliary BatchNorms.

    Raises:
        TypeError: naming both.
    """
    if not isinstance(net, DualNet):
        raise TypeError(f"net is a {type(net).__name__}: {who} trains a network with two BatchNorms, DualNet(net=...)")
