"""What methods share that begin each sample's attack where its last one led."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import check_count
from ...callbacks.attacks.fgsm import FGSM
from ...functional.geometry import project
from ...functional.regularizers import relaxed_labels
from ..base import Method, OptimizerFactory
from ..example import Example
from ..per_sample import PerSample, Storage
from ..ranks import sum_over_ranks
from ..schedules import Schedule
from .arguments import check_label_factor
from .crafting import draws_of, radius_of
from .started import StartedExample, check_given_start, run_from


@dataclass
class PriorExample(StartedExample):
    """A batch with what is kept of it for its next epoch.

    Args:
        prior: (B, columns, C, H, W), of which the first is a perturbation.
    """

    prior: Tensor | None = None


class PriorGuided(Method):
    """Single-step training whose attack starts from a perturbation kept of each sample (Jia et al. 2022, arXiv 2207.08859).

    A sample that has none yet starts at x + eps * s, with s plus or minus 1 at random in each entry. The network sees the start
    cut to [0, 1]; the step itself goes on from the kept perturbation. The batches must hold the samples' indices, as those of
    an :class:`robust_pl.data.ImageDataModule` do. Perturbations are those of augmented images: where a sample is shifted or
    mirrored otherwise in the next epoch, they no longer lie where they did; so in the papers. They are written after the
    optimizer's step and are part of the checkpoint, in files beside it, see :class:`robust_pl.methods.per_sample.PerSample`,
    which says how much memory they take and how processes share them.

    A subclass names what is kept in ``columns``, the perturbation first, and defines :meth:`next_prior` and :meth:`loss`.

    Args:
        attack: FGSM without a start of its own; by default at 8/255 in train mode.
        label_factor: relax the labels, those that the attack sees, too, see
            :func:`robust_pl.functional.regularizers.relaxed_labels`; None takes them as they are. The authors of these methods
            take 0.6 on hard labels.
        reset_every: epochs after which all that is kept is forgotten; None never does.
        storage: dtype of what is kept, ``float32`` or ``bfloat16``.
        net: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the attack is no FGSM.
        ValueError: if an argument is out of its range, the attack has a start of its own, or, at the first batch, there is no
            index in it.
    """

    columns: tuple[str, ...] = ("perturbation",)
    compares: bool = True
    """Whether the loss looks at the logits of the start."""

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None,
        label_factor: float | None,
        reset_every: int | None,
        storage: Storage,
        optimizer: OptimizerFactory,
        schedule: Schedule | None,
        weights: str | None,
        num_classes: int,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_given_start(self.attack, type(self).__name__, "the perturbation kept of each sample")
        check_label_factor(label_factor, num_classes)
        if reset_every is not None:
            check_count("reset_every", reset_every)
        self.label_factor, self.reset_every = label_factor, reset_every
        self.per_sample = PerSample(self.columns, storage)

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, bn_mode="train")

    def next_prior(self, example: StartedExample, kept: Tensor, radius: float | Tensor) -> Tensor:
        """What to keep of the samples from here on, (B, columns, C, H, W); by default the perturbation that is trained on.

        Args:
            example: after the attack.
            kept: what was kept so far, likewise.
            radius: of each sample, (B, 1, 1, 1), or of all.
        """
        return (example.x_adv - example.x).unsqueeze(1)

    def clean(self, batch: tuple[Tensor, ...]) -> Example:
        if len(batch) < 3:
            raise ValueError(
                f"{type(self).__name__} keeps a perturbation of each training sample and the batches have no index: yield "
                "(x, y, index) with the position of each sample in the data set, as an ImageDataModule does"
            )
        example = super().clean(batch)
        if self.label_factor is None:
            return example
        return replace(example, y=relaxed_labels(example.y, self.num_classes, self.label_factor, example.x.dtype))

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> PriorExample:
        example = self.clean(batch)
        x = example.x.to(torch.promote_types(example.x.dtype, torch.float32))  # bf16 arithmetic steps out of the ball
        radius = radius_of(self, x, eps)
        kept = self._kept(example.index, x, radius)
        started = run_from(self, example, eps, x + kept[:, 0], self.compares)
        return PriorExample(**vars(started), prior=self.next_prior(started, kept, radius))

    def after_step(self, example: PriorExample) -> None:
        self.per_sample.write(example.index, example.prior, self.current_epoch)

    def _kept(self, index: Tensor, x: Tensor, radius: float | Tensor) -> Tensor:
        """What is kept of these samples, (B, columns, C, H, W), with a perturbation for those that have none yet."""
        kept, written = self.per_sample.read(index)
        since = 0 if self.reset_every is None else self.current_epoch // self.reset_every * self.reset_every
        kept = kept.to(x.dtype).where((written >= since).view(-1, 1, 1, 1, 1), 0.0)
        first = radius * (draws_of(self, "prior", x.device).uniform(x) - 0.5).sign()
        kept[:, 0] = kept[:, 0].where((written >= since).view(-1, 1, 1, 1), first)
        return kept

    # Around a run ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self.per_sample.open(self.trainer, self.device, type(self).__name__)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.per_sample.raise_if_stray()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.per_sample.save(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.per_sample.resume(checkpoint)


def with_momentum(method: PriorGuided, example: StartedExample, kept: Tensor, radius: float | Tensor, decay: float) -> Tensor:
    """The next perturbation and momentum, (B, 2, C, H, W), of kept ones (d, m): m' = g / ||g||_1 + decay * m, and
    d' = d + step * sign(m'), brought back into the ball of ``radius`` and with x + d' into [0, 1].

    The norm is over all entries of the batch, those of other processes included; under accumulation, of each micro-batch.
    """
    gradient, (delta, momentum) = example.gradient, kept.unbind(1)
    norm = sum_over_ranks(gradient.abs().sum())
    momentum = gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny) + decay * momentum
    step = radius if method.attack.step_size is None else method.attack.step_size
    x = example.x.to(gradient.dtype)
    delta = project(x + delta + step * momentum.sign(), x, radius, "linf") - x
    return torch.stack([delta, momentum], 1)
