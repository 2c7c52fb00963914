"""What every weight perturbation shares: the loss of a step is asked again at other weights, which then come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn import Parameter


class WeightPerturbation(Callback, ABC):
    """Trains with gradients taken at perturbed weights. It works with every :class:`robust_pl.methods.Method`.

    The training attack runs once a step, at the weights themselves; only the loss is asked again. With
    ``accumulate_grad_batches`` there is one perturbation for all micro-batches of a step, and on several processes all have
    the same. A method finds its perturbation among the trainer's callbacks and hands it each step, see :meth:`step`.

    Args:
        start_epoch: first epoch with a perturbation; before it, steps are ordinary ones.

    Raises:
        ValueError: if start_epoch is negative.
    """

    def __init__(self, start_epoch: int = 0) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch} must be at least 0")
        self.start_epoch = start_epoch

    @abstractmethod
    def step(
        self,
        module: LightningModule,
        gradients: Callable[[], Any],
        gradients_again: Callable[[bool], None],
        update: Callable[[Any], None],
    ) -> None:
        """One optimizer step.

        Args:
            module: whose weights are perturbed.
            gradients: ends the first pass: attacks and differentiates the last micro-batch, so that ``grad`` holds the
                gradient at the weights of that pass; returns the loss.
            gradients_again: replaces ``grad`` by the gradient of the same examples at the weights as they are now; its
                argument says whether BatchNorm's running statistics move.
            update: calls the optimizer, given the loss.
        """

    def around_loss(self, module: LightningModule) -> AbstractContextManager[None]:
        """What surrounds the loss of the first pass, whose backward pass comes later."""
        return nullcontext()

    @classmethod
    def among(cls, callbacks: list[Callback]) -> WeightPerturbation | None:
        """The perturbation among a trainer's callbacks, if there is one.

        Raises:
            ValueError: if there are several.
        """
        found = [callback for callback in callbacks if isinstance(callback, WeightPerturbation)]
        if len(found) > 1:
            names = " and ".join(type(callback).__name__ for callback in found)
            raise ValueError(f"trainer.callbacks has {names}, which would each perturb the weights of a step: keep one of them")
        return found[0] if found else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is trained."""
        if stage != "fit":
            return
        name = type(self).__name__
        WeightPerturbation.among(trainer.callbacks)
        reason = getattr(pl_module, "refuses_perturbation", "it is no robust_pl.methods.Method, whose loss can be asked again")
        if reason is not None:
            raise ValueError(
                f"{name} cannot be combined with {type(pl_module).__name__}: {reason}; remove it from trainer.callbacks"
            )
        if "16" in str(trainer.precision) and "bf16" not in str(trainer.precision):
            raise ValueError(f"{name} differentiates twice a step, which precision 16 cannot scale: choose bf16-mixed or 32")
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"{name} needs whole weights on each process, and {type(trainer.strategy).__name__} shards them: choose ddp"
            )


def differentiated(module: LightningModule) -> dict[str, Parameter]:
    """The parameters that the last backward pass gave a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.grad is not None}


def gradients_of(parameters: dict[str, Parameter]) -> list[Tensor]:
    """Their gradients, in their order."""
    return [p.grad for p in parameters.values() if p.grad is not None]


class Displaced:
    """Weights moved by offsets, and brought back bit for bit: adding and subtracting would leave a rounding error.

    Args:
        parameters: what is moved, in place.
        offsets: by how much, one for each.
    """

    def __init__(self, parameters: list[Parameter], offsets: list[Tensor]) -> None:
        self.parameters = parameters
        with torch.no_grad():
            self.before = [p.detach().clone() for p in parameters]
            torch._foreach_add_([p.detach() for p in parameters], offsets)

    def restore(self) -> None:
        """Back to where they were."""
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], self.before)

    def restore_and_keep(self, change: Callable[[], None]) -> None:
        """Let ``change`` act on the moved weights, then bring them back with that change; without one, bit for bit."""
        with torch.no_grad():
            weights = [p.detach() for p in self.parameters]
            moved = [p.clone() for p in weights]
        try:
            change()
        except BaseException:
            self.restore()
            raise
        with torch.no_grad():
            torch._foreach_sub_(weights, moved)
            torch._foreach_add_(weights, self.before)
