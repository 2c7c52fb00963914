"""Free adversarial training."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.fgsm import FGSM
from ...functional.geometry import project, steepest
from ..base import Method, OptimizerFactory
from ..example import Example
from ..ranks import of_all_ranks
from ..schedules import Schedule


class FreeAT(Method):
    """Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843): each batch is replayed ``replays`` times.

    A replay costs one forward and one backward pass, and its gradients move the weights and the perturbation alike, which goes
    on from batch to batch and belongs to no image. A step is a replay: ``max_epochs`` counts passes over the data as always, so
    divide the epochs of ordinary training by ``replays``; schedules by step, ``max_steps``, ``trainer.global_step`` and the
    numbering of logged values count replays. ``after_step`` follows every replay; averages of weights update once a batch.
    Cost: ``replays`` forward and as many backward passes a batch, in train mode, and none for an attack of its own.

    Where a carried perturbation would leave [0, 1] on a new image, the network sees it clipped. The public port of Wong et al.
    shows it unclipped in the first replay.

    Without ``carry`` each batch begins at its clean images, which the first of its replays trains on. That is another method,
    which the FastAT benchmark (Pan and Yao 2026, arXiv 2604.22853) runs under this name, with 4 replays; statistics of
    BatchNorm that an average computes again (``buffers: method``) are then those of clean images.

    Args:
        attack: gives ``eps``, ``norm`` and ``step_size`` (eps by default) of the perturbation; it is not run, so its ``seed``
            and ``bn_mode`` mean nothing here. FGSM with 8/255 by default.
        replays: m, how often each batch is shown in a row; 8 is the authors' choice on CIFAR-10.
        carry: whether the perturbation goes on from batch to batch, as the authors have it, or begins at zero in each.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if replays is below 1, or the attack asks for what replays cannot do.
        TypeError: if the attack is no FGSM.
    """

    refuses_perturbation = "its replays already step the weights inside one batch"

    def __init__(
        self,
        net: nn.Module,
        attack: FGSM | None = None,
        replays: int = 8,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
        carry: bool = True,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not isinstance(replays, int) or replays < 1:
            raise ValueError(f"replays={replays} must be a whole number of at least 1")
        _check(self.attack)
        self.replays, self.carry = replays, carry
        self.automatic_optimization = False
        # Each process has its own: a buffer would be overwritten by that of rank 0.
        self._delta: Tensor | None = None

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM()

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        """The batch with the perturbation as it is now; it costs no pass."""
        x = batch[0]
        wide = self._wide(x)
        x_adv = project(wide + self._carried(wide), wide, self.attack.eps if eps is None else eps, self.attack.norm)
        return replace(self.clean(batch), x_adv=x_adv.to(x.dtype))

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x_adv), example.y)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._check_first(batch)
        self._end_of_batch()  # a run that was broken off inside a batch may be fitted again
        optimizer, schedulers = self.optimizers(), self._steppers()
        total = torch.zeros((), device=batch[0].device)
        for replay in range(self.replays):
            example = self.craft(batch)
            x_adv = example.x_adv.requires_grad_()
            loss = self.loss(example)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self._move(batch[0], x_adv.grad)
            optimizer.step()
            for interval, scheduler in schedulers:
                if interval == "step" or (replay + 1 == self.replays and self._ends_epoch(batch_idx)):
                    scheduler.step()
            x_adv.requires_grad_(False).grad = None
            self.after_step(example)
            total += loss.detach()
        self._end_of_batch()
        self.log("train/loss", total / self.replays, prog_bar=True, on_step=True, batch_size=len(batch[0]))

    def optimizer_steps(self) -> float:
        """Replays of the whole run."""
        steps, limit = super().optimizer_steps() * self.replays, self.trainer.max_steps
        return steps if limit == -1 else min(steps, limit)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Lightning's checkpoints would like to keep the weights from before a step, which resuming has no use for.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["robust_pl_free_at"] = {"delta": of_all_ranks(None if self._delta is None else self._delta.cpu().clone())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("robust_pl_free_at", {}).get("delta", [])
        # Over another number of processes the batches are others, and so it begins at zero.
        self._delta = found[self.global_rank] if self.carry and len(found) == self.trainer.world_size else None

    def _carried(self, x: Tensor) -> Tensor:
        """The perturbation of this many images; a batch smaller than the largest one moves the first part of it alone."""
        if self._delta is not None and self._delta.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"the perturbation carried from batch to batch is one of images {tuple(self._delta.shape[1:])}, and these are "
                f"{tuple(x.shape[1:])}: give all images of a run one size"
            )
        kept = x[:0] if self._delta is None else self._delta.to(x)
        self._delta = torch.cat([kept, torch.zeros_like(x[len(kept) :])]) if len(kept) < len(x) else kept
        return self._delta[: len(x)]

    def _end_of_batch(self) -> None:
        if not self.carry:
            self._delta = None

    @torch.no_grad()
    def _move(self, x: Tensor, gradient: Tensor) -> None:
        x = self._wide(x)
        delta = self._carried(x)
        attack = self.attack
        step = attack.eps if attack.step_size is None else attack.step_size
        moved = x + delta + step * steepest(gradient.to(x.dtype), attack.norm)
        delta.copy_(project(moved, x, attack.eps, attack.norm) - x)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        # bf16 arithmetic steps out of the ball.
        return x.detach().to(torch.promote_types(x.dtype, torch.float32))

    def _steppers(self) -> list[tuple[str, Any]]:
        """Schedulers, which Lightning leaves to methods that call the optimizer themselves."""
        return [(config.interval, config.scheduler) for config in self.trainer.lr_scheduler_configs]

    def _ends_epoch(self, batch_idx: int) -> bool:
        # Not a hook at the epoch's end: validation, whose checkpoint holds the schedule, comes before it.
        return self.trainer.is_last_batch or batch_idx + 1 >= self.trainer.num_training_batches


def _check(attack: FGSM) -> None:
    if not isinstance(attack, FGSM):
        raise TypeError(f"attack is a {type(attack).__name__}: FreeAT takes FGSM, whose eps and step_size its replays use")
    wrong = {
        "random_start": (bool(attack.random_start), "a perturbation goes on from the batch before or from zero: leave it out"),
        "restarts": (attack.restarts > 1, "a perturbation goes on from the batch before or from zero: leave it out"),
        "objective": (attack.objective not in (None, "ce"), "one backward pass serves weights and perturbation: choose 'ce'"),
    }
    for field, (refused, remedy) in wrong.items():
        if refused:
            raise ValueError(f"attack.{field}={getattr(attack, field)!r} has no place in FreeAT, where {remedy}")
    if isinstance(attack.eps, Tensor):
        raise ValueError("attack.eps is a tensor, and FreeAT has one perturbation for all images: give one number")
