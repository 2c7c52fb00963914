"""The gradients of an optimizer step once more, at whatever weights a perturbation has brought about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from lightning.pytorch import LightningModule
from torch.nn.parallel import DistributedDataParallel

from ..nets.statistics import untracked
from .example import Example


def differentiate_again(method: LightningModule, examples: Sequence[Example], tracked: bool) -> None:
    """Add to ``grad`` what the micro-batches of a step added, without their attacks. One forward and one backward pass each.

    Args:
        method: its ``loss`` is asked, in the precision of the run; processes reduce gradients with the last micro-batch.
        examples: the micro-batches of the step.
        tracked: whether BatchNorm's running statistics move.
    """
    trainer = method.trainer
    wrapper = trainer.strategy.model if isinstance(trainer.strategy.model, DistributedDataParallel) else None
    # Through the wrapper, so that it knows which weights take part, and reduces their gradients.
    loss_of = method.loss if wrapper is None else partial(trainer.strategy._forward_redirection, wrapper, method, "loss")
    for example in examples:
        with ExitStack() as around:
            if wrapper is not None and example is not examples[-1]:
                around.enter_context(wrapper.no_sync())
            around.enter_context(trainer.precision_plugin.train_step_context())
            if not tracked:
                around.enter_context(untracked(method))
            loss = loss_of(example) / trainer.accumulate_grad_batches
        loss.backward()
