"""The base of runs that put a network together from weights on disk and train nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.prepare import evaluating
from ...callbacks.weights.averaging import WeightAverage
from ...callbacks.weights.recompute import recompute, statistics_of, training_modes
from ..base import Method
from ..example import Example
from .ingredients import write

SOUP_KEY = "robust_pl_soup"
"""Where a checkpoint says what its network was made of: plain numbers, strings and tensors."""


class Assembled(Method):
    """Puts a network together as the run begins. The run then is one step that changes nothing, after which Lightning
    validates and saves as after any other, whatever ``max_epochs`` and ``limit_train_batches`` say.

    Args:
        batches: training batches of each process from which BatchNorm's running statistics are computed again, on attacked
            images where there is an attack; 0 leaves those that :meth:`assemble` wrote.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if batches is negative.
    """

    refuses_perturbation = "it takes no gradient step"

    def __init__(self, net: nn.Module, attack: Attack | None, batches: int, num_classes: int) -> None:
        super().__init__(net, attack, optimizer=lambda params: SGD(params, lr=0.0), num_classes=num_classes)
        if batches < 0:
            raise ValueError(f"batches={batches} must be at least 0")
        self.batches = batches
        self.made_of: dict[str, Any] | None = None
        """What the network was put together from; also in the checkpoint."""

    @abstractmethod
    def assemble(self) -> dict[str, Any]:
        """Write the weights into ``self.net``; return what they were made of: plain numbers, strings and tensors."""

    @abstractmethod
    def check(self) -> None:
        """Find the weights and refuse those of another network, before anything runs."""

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x if example.x_adv is None else example.x_adv), example.y)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """There is nothing to differentiate."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        refuse_averages(self.trainer, self)
        self.check()
        self.trainer.fit_loop.max_epochs = 1
        self.trainer.limit_train_batches = 1

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.made_of is None:
            self.made_of = self.assemble()
            self.refresh_statistics()

    def refresh_statistics(self) -> None:
        """Compute BatchNorm's running statistics again, for the weights that are in ``self.net``."""
        if self.batches and statistics_of(self):
            write(self, recompute(self.trainer, self, training_modes(self), self.batches, clean=False).items())

    def held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Validation batches (x, y, index) of this process, on the device.

        Raises:
            ValueError: if there are none.
        """
        loaders = self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [] if loaders is None else [loaders]
        if not loaders:
            raise ValueError(
                f"{type(self).__name__} chooses on held-out samples and there are none: set data.init_args.val_size"
            )
        first = 0
        for batch in chain(*loaders):
            x, y, *index = self.trainer.strategy.batch_to_device(batch)
            yield x, y, index[0] if index else torch.arange(first, first + len(x), device=x.device)
            first += len(x)

    def held_out_accuracy(self) -> float:
        """Of the weights that are in the network, over all processes: clean, or attacked where there is an attack."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        with evaluating(self), self.trainer.precision_plugin.val_step_context():
            for x, y, index in self.held_out():
                if self.attack is not None:
                    x = self.attack.run(self, x, y, objective=self.inner_objective, index=index).x_adv.to(x.dtype)
                with torch.no_grad():
                    right = self(x).argmax(1) == y
                counts += torch.stack([right.sum(), right.new_tensor(len(x), dtype=torch.int64)])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(counts)
        return float(counts[0] / counts[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[SOUP_KEY] = self.made_of

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.made_of = checkpoint.get(SOUP_KEY)


def refuse_averages(trainer: Trainer, method: Method) -> None:
    """Refuse EMA, SWA and the like, which follow what an optimizer moves: here that is no weight.

    Raises:
        ValueError: naming both.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAverage):
            raise ValueError(
                f"{type(callback).__name__} cannot be combined with {type(method).__name__}, whose optimizer moves no weights "
                "to average: remove it from trainer.callbacks, or soup the averages, PATH#ema"
            )
