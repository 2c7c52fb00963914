"""NuAT."""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import check_count
from ...functional.output_distances import nuclear_distance
from ..base import OptimizerFactory
from ..schedules import Schedule
from .guided_fgsm import GuidedFGSM


class NuAT(GuidedFGSM):
    """Nuclear norm adversarial training (Sriramanan et al., NeurIPS 2021): see :class:`GuidedFGSM`, with the distance
    ||f(x) - f(x_adv)||_* / B, in which ||.||_* is the sum of the singular values of the batch's matrix (B, K).

    The weight is 0 in the first epoch, which so is one of clean training, and rises by lmbda / rise_epochs after each epoch, up
    to lmbda. The term falls like 1 / sqrt(B) with the size of the batch, so lmbda belongs to one size, and to one number of
    classes; ``reference_batch`` takes the former back. On several processes each takes the norm of its own batch, so B is the
    size on one of them. The authors divide an epoch's last batch by the full size, where B here is its own. With
    :class:`robust_pl.callbacks.EMA` it is their NuAT-WA.

    Args:
        lmbda: the weight in the end: 4 for the authors' NuAT-WA and 4.5 for NuAT, both with batches of 64 and 10 classes.
        rise_epochs: how many epochs until then, 90 of 100 for their NuAT; None takes the whole run, as for NuAT-WA, after whose
            last epoch it would be reached.
        reference_batch: the size of batch that lmbda is meant for: the term is multiplied by sqrt(B / reference_batch). None
            leaves it as in the paper.
        net: see :class:`GuidedFGSM`, and so all others.

    Raises:
        ValueError: if an argument is out of its range, or the length of the run is asked for and unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 4.0,
        rise_epochs: int | None = None,
        reference_batch: int | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, lmbda, optimizer, schedule, weights, num_classes)
        for name, value in (("rise_epochs", rise_epochs), ("reference_batch", reference_batch)):
            if value is not None:
                check_count(name, value)
        self.rise_epochs, self.reference_batch = rise_epochs, reference_batch

    def distance(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        size = len(logits) if self.reference_batch is None else sqrt(len(logits) * self.reference_batch)
        return nuclear_distance(logits, logits_adv) / size

    def weight(self) -> float:
        epochs = self.trainer.max_epochs if self.rise_epochs is None else self.rise_epochs
        return self.lmbda * min(self.current_epoch / epochs, 1.0)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.rise_epochs is None and self.trainer.max_epochs in (None, -1):
            raise ValueError("lmbda rises over a run of unknown length: set rise_epochs or trainer.max_epochs")
