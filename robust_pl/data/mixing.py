"""Augmentations that change labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .augmentations import Augmentation, box, partners
from .beta import Beta
from .hashing import uniform


class CutMix(Augmentation):
    """CutMix (Yun et al. 2019, arXiv 1905.04899): a box of another image of the batch is pasted in, and labels mix alike.

    With lambda ~ Beta(alpha, alpha), the box has sides sqrt(1 - lambda) of the image's, rounded down, around a random pixel and
    cut off at the edges; the label is then mixed by the share of pixels that were really kept. The authors draw one box a
    batch; here every sample has its own, which its key says. Only the partner depends on the batch: it is the next sample in
    an order drawn from the keys, never the sample itself unless it is alone. So another batch size or number of processes
    gives other partners; a resumed run does not.

    Args:
        alpha: of the Beta distribution, above 0; 1 draws uniformly.
        probability: share of the samples that are mixed, in [0, 1]; the authors mix half of the batches on CIFAR.

    Raises:
        ValueError: if an argument is out of range.
    """

    mixes_labels = True

    def __init__(self, alpha: float = 1.0, probability: float = 1.0) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha} must be a number above 0")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability} must lie in [0, 1]")
        self.alpha, self.probability = alpha, probability
        self._beta = Beta(alpha, alpha)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        side = (1 - self._beta(uniform(keys, 0))).sqrt() * (uniform(keys, 1) < self.probability)
        rows, columns = box(keys, 2, (height, width), (height * side).long(), (width * side).long())
        partner = partners(keys, 4)
        inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        kept = (1 - (rows.sum(1) * columns.sum(1)).to(y.dtype) / (height * width)).unsqueeze(1)
        return torch.where(inside, x[partner], x), kept * y + (1 - kept) * y[partner]


class LabelSmoothing(Augmentation):
    """Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): ``(1 - amount) * y + amount / K`` for K classes.

    Cross-entropy then equals that of ``torch.nn.functional.cross_entropy(label_smoothing=amount)``. The labels themselves are
    smoothed, so a training attack that maximises cross-entropy also sees smooth ones; that of TRADES looks at no label.

    Args:
        amount: in [0, 1].

    Raises:
        ValueError: if the amount is out of range.
    """

    mixes_labels = True

    def __init__(self, amount: float = 0.1) -> None:
        if not 0 <= amount <= 1:
            raise ValueError(f"amount={amount} must lie in [0, 1]")
        self.amount = amount

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return x, (1 - self.amount) * y + self.amount / y.shape[1]
