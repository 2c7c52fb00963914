"""Sub-AT: adversarial training in the subspace of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.weights.subspace import Start, SubspaceTraining, only_subspace
from ...functional.subspace import Storage
from ..base import OptimizerFactory
from ..schedules import Schedule
from .pgd_at import PGDAT


class SubspaceAT(PGDAT):
    """Sub-AT (Li et al. 2022, arXiv 2111.12229): single-step adversarial training in the subspace of an earlier run's weights.

    The earlier run is one of fast adversarial training with :class:`WeightTrajectory`, stopped before overfitting. From its
    start, this run trains in the span of its principal directions, see :class:`SubspaceTraining`, where the authors see
    neither catastrophic nor robust overfitting and use a larger radius: without an attack of your own, FGSM from a random
    start with eps 16/255 and step 20/255 in train mode, for a test at 8/255. Other methods train in a subspace with the
    callback itself.

    Cost: the attack's passes, and one forward and one backward pass a step: 2 + 2 with FGSM. Before, the earlier run: 65 epochs
    for 40 of this one in the paper.

    Args:
        trajectory: the earlier run, see :class:`SubspaceTraining`, and so ``start``, ``skip`` and ``storage``.
        dim: number of directions; the authors take 80 of 131 samples of a fast run, 100 of 201 of PGD's.
        optimizer: SGD with learning rate 1, which goes with orthonormal directions, and without weight decay.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: see :class:`SubspaceTraining`.
    """

    def __init__(
        self,
        net: nn.Module,
        trajectory: str | list[str],
        attack: Attack | None = None,
        dim: int | None = 80,
        start: Start = "first",
        skip: int = 0,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=1.0, momentum=0.9),
        schedule: Schedule | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, num_classes=num_classes)
        self.subspace_training = SubspaceTraining(trajectory, dim, start=start, skip=skip, storage=storage)

    @staticmethod
    def default_attack() -> Attack:
        return FGSM(16 / 255, 20 / 255, random_start=True, bn_mode="train")

    def configure_callbacks(self) -> Sequence[Callback]:
        return only_subspace(self.trainer, self.subspace_training)
