"""TWA: an average of weights whose coefficients are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.weights.recompute import recompute, training_modes
from ...callbacks.weights.subspace import SubspaceTraining, only_subspace
from ...functional.subspace import Storage
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class TWA(Method):
    """Trainable weight averaging (Li et al. 2023, arXiv 2205.13104): theta = sum_i beta_i w_i, where beta is trained.

    The w_i are weights that an earlier run went through. It starts at their mean, the point of SWA, and takes steps of SGD with
    gradients projected onto their span, which is the same as training beta in an orthonormal basis; beta is free, neither
    positive nor summing to 1. On training data this is the paper's method; for samples that no w_i was trained on
    (:class:`robust_pl.data.HeldOut`) see :class:`LayerwiseTWA`, too. With an attack the loss is that of attacked samples: this
    use is ours. BatchNorm's statistics are computed again at the end of each epoch, on what it trains on.

    Cost: the attack's passes, and one forward and one backward pass a step, and for each epoch ``batches`` forward passes with
    their attacks. The basis takes t times the memory of the weights, see ``storage``; several processes share it.

    Args:
        trajectory: the earlier run, or a folder or list of weights, see :class:`SubspaceTraining`, and so ``storage``.
        attack: of the training samples; None trains on clean ones.
        skip: leave out so many of the first samples.
        optimizer: SGD with learning rate 2, which goes with an orthonormal basis, and a weight decay that stays in the span.
        schedule: the authors divide by 10 after 50 % and 75 % of the epochs: ``MultiStep([0.5, 0.75])``.
        weights: where to start instead of at the mean, such as the last weights of the run; then without weight decay.
        batches: training batches of each process for BatchNorm's statistics; 0 leaves them as training moves them.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of range; see also :class:`SubspaceTraining`.
    """

    def __init__(
        self,
        net: nn.Module,
        trajectory: str | list[str],
        attack: Attack | None = None,
        skip: int = 0,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=2.0, momentum=0.9, weight_decay=1e-5),
        schedule: Schedule | None = None,
        weights: str | None = None,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if batches < 0:
            raise ValueError(f"batches={batches} must be at least 0: BatchNorm's statistics are computed again from them")
        self.batches = batches
        self.subspace_training = SubspaceTraining(
            trajectory,
            centred=False,
            start="mean" if weights is None else "current",
            skip=skip,
            storage=storage,
        )

    def configure_callbacks(self) -> Sequence[Callback]:
        return only_subspace(self.trainer, self.subspace_training)

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x if example.x_adv is None else example.x_adv), example.y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        length = self.trainer.num_training_batches
        ends = batch_idx + 1 == length or self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.batches and ends:
            state, batches = self.state_dict(), int(min(self.batches, length))
            for name, found in recompute(self.trainer, self, training_modes(self), batches, clean=False).items():
                state[name].copy_(found)
