"""FGSM-PCO."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...functional.losses import hard, wide
from ..base import OptimizerFactory
from ..per_sample import Storage
from ..ranks import mean_over_ranks
from ..schedules import Schedule
from .prior import PriorExample, PriorGuided
from .started import logits_at_start


class FGSMPCO(PriorGuided):
    """FGSM-PCO (Wang et al. 2024, arXiv 2407.12443): training on a mixture of each sample's last perturbation and its new one.

    The attack starts at x0, which is x with the perturbation of the epoch before, and leads to x1 = x + d. With z0 and z1 the
    logits of x0 and x1, c = 1 - softmax(z0)_y the lack of confidence in each sample, and z the logits of the mixture,

        x_mix = c * x0 + (1 - c) * (x + overstep * d)
        L = CE(z, y) + lmbda * | mean (z1 - z0)^2 - mean (z1 - z)^2 |

    and d is what is kept, see :class:`PriorGuided`. x + overstep * d leaves the ball, and the box, on purpose: with an overstep
    of 1.5 and eps 8/255 it reaches 12/255. Means are over samples and classes; which of the two is larger is decided over all
    processes together. x0 is cut to [0, 1], which the authors do not.

    In the authors' code the gradient also flows through c, so that the weights may lower the loss by choosing an easier
    mixture; here c is held fixed unless ``attached_confidence``. A compiled network is refused.

    Cost: three forward and four backward passes a step, in which the first of the former is the attack's own where its
    ``bn_mode`` is ``train``; and the memory of one image a training sample, which processes share.

    Args:
        overstep: beta of the paper.
        lmbda: weight of the second term.
        attached_confidence: for exact reproduction of the authors and of a public benchmark (Pan and Yao 2026, arXiv
            2604.22853).
        label_factor: see :class:`PriorGuided`; the benchmark takes 0.6 on labels that are smoothed by 0.4 already.
        reset_every: None, as in the paper, keeps perturbations for the whole run.
        net: see :class:`PriorGuided`, and so all others.

    Raises:
        TypeError: see :class:`PriorGuided`.
        ValueError: if overstep or lmbda is negative, and see :class:`PriorGuided`.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        overstep: float = 1.5,
        lmbda: float = 10.0,
        attached_confidence: bool = False,
        label_factor: float | None = None,
        reset_every: int | None = None,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, label_factor, reset_every, storage, optimizer, schedule, weights, num_classes)
        for field, value in (("overstep", overstep), ("lmbda", lmbda)):
            if value < 0:
                raise ValueError(f"{field}={value} must be at least 0")
        self.overstep, self.lmbda, self.attached_confidence = overstep, lmbda, attached_confidence

    def loss(self, example: PriorExample) -> Tensor:
        x, y = example.x, example.y
        before = wide(logits_at_start(self, example))
        doubt = 1 - before.softmax(1).gather(1, hard(y).unsqueeze(1)).view(-1, 1, 1, 1)
        doubt = (doubt if self.attached_confidence else doubt.detach()).to(x.dtype)
        beyond = x + self.overstep * (example.x_adv - x)
        mixed = self(doubt * example.start + (1 - doubt) * beyond)
        after = wide(self(example.x_adv))
        gap = F.mse_loss(after, before) - F.mse_loss(after, wide(mixed))
        return F.cross_entropy(mixed, y) + self.lmbda * mean_over_ranks(gap).sign() * gap
