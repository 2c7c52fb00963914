"""Adversarial fine-tuning of a naturally trained network."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ..base import OptimizerFactory
from ..schedules import Schedule, SlowStartFastDecay
from .pgd_at import PGDAT


class AdversarialFineTuning(PGDAT):
    """Adversarial fine-tuning (Jeddi et al. 2020, arXiv 2012.13628): PGD adversarial training of another run's network.

    The loss is that of :class:`PGDAT`; what differs is where it starts, how the learning rate moves and how short it is: about
    ten epochs. The curve of :class:`SlowStartFastDecay` is a reconstruction, its numbers and the default learning rate of 0.05
    are ours. BatchNorm is in train mode, so its statistics adapt to attacked samples, for which natural ones are poor. The last
    epoch is the result; the paper's claim is that such a run is too short to overfit. Cost: as :class:`PGDAT`, 11 + 11 passes a
    step with PGD-10, beside the training of the network that it starts from.

    Args:
        weights: of the naturally trained network, required: a run's folder, a checkpoint or a state dict.
        schedule: None takes ``SlowStartFastDecay()``.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if no weights are given.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        if weights is None:
            raise ValueError(
                "weights=None: adversarial fine-tuning starts from a trained network, name its run or file with "
                "--model.init_args.weights PATH (for a network with weights of its own, use PGDAT and SlowStartFastDecay)"
            )
        super().__init__(net, attack, optimizer, schedule or SlowStartFastDecay(), weights, num_classes)
