"""A PGD adversarial training of both sides, on batches that are handed out one by one: whoever hands them out may measure.

Ours is the user's: ``PGDAT`` under a Lightning ``Trainer``, without progress bar, logger and checkpoints. The other one is
``benchmarks/lean.py``. Both ask for a batch when they are done with the one before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from . import lean

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from robust_pl.methods import PGDAT

EPS, STEP_SIZE = 8 / 255, 2 / 255
Batch = tuple[Tensor, Tensor]
Train = Callable[[nn.Module, Iterator[Batch], int, int], None]


class Loader:
    """One pass over an iterator whose length the Trainer is told, so that it does not fetch ahead.

    It is told one more than there is: the Trainer then asks again after the last batch, and so ends the last measurement.
    """

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count + 1

    def __iter__(self) -> Iterator[Batch]:
        return self.batches


def fit(net: nn.Module, batches: Iterator[Batch], count: int, steps: int, random_start: bool = True) -> tuple[PGDAT, Trainer]:
    """Train under a Trainer on so many batches of (x, y), which lie on the network's device, with so many attack steps."""
    # Here, since who measures the memory of the plain loop must not find Lightning in it.
    from lightning.pytorch import Trainer

    from robust_pl.callbacks import PGD
    from robust_pl.methods import PGDAT

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    trainer = Trainer(
        accelerator="gpu" if next(net.parameters()).is_cuda else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    attack = PGD(EPS, STEP_SIZE, steps, random_start=random_start)
    method = PGDAT(net, attack, optimizer=sgd, num_classes=classes(net))
    trainer.fit(method, Loader(batches, count))
    return method, trainer


def ours(net: nn.Module, batches: Iterator[Batch], count: int, steps: int) -> None:
    """Train, see :func:`fit`; the network stays where it is."""
    device = next(net.parameters()).device
    fit(net, batches, count, steps)
    net.to(device)  # the Trainer leaves a network on the CPU


def by_hand(net: nn.Module, batches: Iterator[Batch], count: int, steps: int) -> None:
    """The same by the plain loop."""
    optimizer = sgd(net.parameters())
    for x, y in batches:
        lean.training_step(net, optimizer, x, y, EPS, STEP_SIZE, steps)


TRAININGS: dict[str, Train] = {"ours": ours, "lean": by_hand}


def sgd(params: Any) -> SGD:
    """Of both sides. The rate is low, since labels are random and a loss that grows without end would be refused."""
    return SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def classes(net: nn.Module) -> int:
    """Number of classes of a network whose last layer is linear."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)][-1].out_features


def random_batch(size: int, pixels: int, num_classes: int, device: torch.device) -> Batch:
    """Random images of 8 bit and random labels: only the cost is of interest."""
    x = torch.randint(256, (size, 3, pixels, pixels)) / 255
    return x.to(device), torch.randint(num_classes, (size,)).to(device)
