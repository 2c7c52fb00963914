"""SAR: spectral alignment regularization."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import choose
from ...functional.losses import DISTANCES, Distance, FourierMode, spectral_distance, wide
from ..base import OptimizerFactory
from ..schedules import Schedule
from .fr import FR

Domain = Literal["logits", "softmax"]


class SAR(FR):
    """Spectral alignment regularization (Huang et al. 2023, arXiv 2306.14262): adversarial cross-entropy + lmbda * distance.

    A reconstruction: of the paper only the abstract was at hand and no code is public, so this is FR with the choices that the
    text leaves open, and lmbda, domain and distance are ours. With :class:`robust_pl.callbacks.EMA` or
    :class:`robust_pl.callbacks.SWA` it is the weight-averaged form. Under ``l2`` it is logit pairing, since the Fourier
    transform keeps lengths. Cost as :class:`FR`.

    Args:
        lmbda: weight of the distance, see :class:`FR`, and so ``mode`` and ``start_epoch``.
        domain: of which outputs the spectrum is taken.
        distance: ``l1``, ``l2`` or ``cosine``, see :func:`robust_pl.functional.losses.spectral_distance`.
        detach_clean: let no gradient through the clean outputs.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of range or unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float | None = None,
        mode: FourierMode = "class1d",
        domain: Domain = "logits",
        distance: Distance = "l1",
        detach_clean: bool = False,
        start_epoch: int = 0,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, lmbda, mode, start_epoch, optimizer, schedule, weights, num_classes)
        choose("domain", domain, ("logits", "softmax"))
        choose("distance", distance, DISTANCES)
        self.domain, self.detach_clean = domain, detach_clean
        self.kind: Distance = distance

    def distance(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        clean, adv = wide(logits.detach() if self.detach_clean else logits), wide(logits_adv)
        if self.domain == "softmax":
            clean, adv = clean.softmax(1), adv.softmax(1)
        return spectral_distance(clean, adv, self.mode, self.kind)
