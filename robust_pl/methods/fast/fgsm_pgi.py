"""FGSM-PGI."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...functional.losses import wide
from ..base import OptimizerFactory
from ..per_sample import Storage
from ..schedules import Schedule
from .prior import PriorExample, PriorGuided, with_momentum
from .started import StartedExample, logits_at_start


class FGSMPGI(PriorGuided):
    """FGSM-PGI (Jia et al. 2022, arXiv 2207.08859), in its variant with momentum of all earlier epochs, FGSM-MEP.

    Of each sample a perturbation d and a momentum m are kept, see :class:`PriorGuided`. With g the gradient of cross-entropy at
    the start x0, which is x + d cut to [0, 1], z0 its logits and ||.||_1 over the whole batch, of all processes,

        m <- g / ||g||_1 + decay * m
        x_adv = x + d + eps * sign(g),   kept: d <- d + eps * sign(m)
        L = CE(z, y) + lmbda * mean (z - z0)^2

    where z are the logits of x_adv and the mean is over samples and classes. Both perturbations are brought back into the ball
    and the box. The gradient flows through z0, too, which is the attack's own pass where its ``bn_mode`` is ``train``. The
    authors show x + d to the network as it is; a public benchmark cuts it to [0, 1] (Pan and Yao 2026, arXiv 2604.22853), as is
    done here. A compiled network is refused.

    Cost: two forward and three backward passes a step, and the memory of two images a training sample, which processes share.

    Args:
        lmbda: weight of the second term; 10 is the authors'.
        decay: of the momentum.
        reset_every: epochs after which perturbations and momenta begin anew: 40 on CIFAR-10; the authors take 10 on CIFAR-100
            and Tiny-ImageNet, the benchmark 40 everywhere.
        net: see :class:`PriorGuided`, and so all others.

    Raises:
        TypeError: see :class:`PriorGuided`.
        ValueError: if lmbda or decay is negative, and see :class:`PriorGuided`.
    """

    columns = ("perturbation", "momentum")

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 10.0,
        decay: float = 0.3,
        label_factor: float | None = None,
        reset_every: int | None = 40,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, label_factor, reset_every, storage, optimizer, schedule, weights, num_classes)
        for field, value in (("lmbda", lmbda), ("decay", decay)):
            if value < 0:
                raise ValueError(f"{field}={value} must be at least 0")
        self.lmbda, self.decay = lmbda, decay

    def next_prior(self, example: StartedExample, kept: Tensor, radius: float | Tensor) -> Tensor:
        return with_momentum(self, example, kept, radius, self.decay)

    def loss(self, example: PriorExample) -> Tensor:
        before = logits_at_start(self, example)
        logits = self(example.x_adv)
        return F.cross_entropy(logits, example.y) + self.lmbda * F.mse_loss(wide(logits), wide(before))
