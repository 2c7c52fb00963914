"""MEHL-Soup."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ...callbacks.attacks.base import Attack
from ...functional.soups import Combination
from ...nets.trajectory import Trajectory
from ..base import OptimizerFactory
from ..schedules import Cosine, Schedule
from .ingredients import Ingredients, mean_of, parameters_of, write
from .learned_soup import LearnedSoup


class MEHLSoup(LearnedSoup):
    """MEHL-Soup (Li, Jiang et al. 2024, arXiv 2407.03641): a learned soup with few models in memory at a time.

    ``theta = c + sum_i X_i (theta_i - c) / |theta_i - c|`` over a batch of ``models`` ingredients, with X from 0 and free, so
    that it may extrapolate. The centre c is the mean of the first batch, and later the soup so far. Whatever X is, the shares
    of the ingredients sum to 1. Ingredients are shuffled; each batch of them is learned on for ``epochs`` epochs with a new
    optimizer and schedule. ``layer_size: null`` is MEHL-Soup; 0 is the layer-wise MEHL-Soup+, with an X and a length for each
    tensor (names as we remember them from the paper). For data, attack and BatchNorm see :class:`LearnedSoup`.

    Cost: the attack's passes, and one forward and one backward pass a step. In memory are ``models`` + 1 networks beside the
    one that is trained and its gradient: the rows and the centre. A checkpoint holds the centre, too.

    Args:
        models: ingredients in memory at a time, b.
        epochs: on each batch of ingredients. ``trainer.max_epochs`` must be a multiple of epochs * ceil(m / b): more than one
            goes over the ingredients again, in another order.
        layer_size: see :class:`LearnedSoup`, and so all others.
        optimizer: of X.
        schedule: on each batch of ingredients, by step; None takes a cosine after a warm-up of 20 %.
        eps: lengths below it are taken for it, as those of a frozen layer, which are 0.
        seed: of the order of the ingredients.

    Raises:
        ValueError: if an argument is out of its range, or the number of epochs does not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        ingredients: Ingredients,
        attack: Attack | None = None,
        skip: int = 0,
        models: int = 18,
        epochs: int = 5,
        layer_size: int | None = None,
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=0.01, weight_decay=0.0),
        schedule: Schedule | None = None,
        eps: float = 1e-8,
        seed: int = 0,
        num_classes: int = 10,
    ) -> None:
        super().__init__(
            net, ingredients, attack, skip, False, layer_size, optimizer, schedule or Cosine(warmup=0.2), num_classes
        )
        for name, value in (("models", models), ("epochs", epochs)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if eps <= 0:
            raise ValueError(f"eps={eps} must be above 0: a layer that is frozen in all ingredients has length 0")
        if schedule is not None and schedule.interval != "step":
            raise ValueError("schedule.interval='epoch' cannot begin anew with each batch of ingredients: choose 'step'")
        self.models, self.epochs, self.eps, self.seed = models, epochs, eps, seed
        self._turn = -1  # which batch of ingredients, counted over all passes
        self._before = torch.zeros(0, 0)  # shares of the ingredients at the centre

    @property
    def shares(self) -> Tensor:
        steps = self.coefficients[: len(self._lengths)] / self._lengths
        shares = self._before * (1 - steps.sum(0))
        shares[self._order(self._turn)] += steps
        return shares

    @property
    def turns(self) -> int:
        """Batches of ingredients in one pass over them."""
        return math.ceil(len(self._samples) / self.models)

    def optimizer_steps(self) -> float:
        return super().optimizer_steps() * self.epochs / self.trainer.max_epochs

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" or self.trainer.fast_dev_run:
            return
        needed, given = self.epochs * self.turns, self.trainer.max_epochs
        if given is None or given < 1 or given % needed:
            raise ValueError(
                f"trainer.max_epochs={given} does not fit {len(self._samples)} ingredients, {self.models} at a time for "
                f"{self.epochs} epochs each: set it to {needed}, or a multiple for several passes"
            )

    def _write(self) -> None:
        self._write_combination(self.coefficients[: self._combination.num_models])

    def _beginning(self) -> Tensor:
        return torch.zeros(self.models, max(self._block.values()) + 1, dtype=self._wide(), device=self.device)

    def _order(self, turn: int) -> Tensor:
        """Positions of the ingredients of a batch of them."""
        number, place = divmod(turn, self.turns)
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randperm(len(self._samples), generator=generator).split(self.models)[place]

    def on_train_start(self) -> None:
        super(LearnedSoup, self).on_train_start()
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._turn, self._before = resumed["turn"], resumed["before"].to(self.device)
            self._place({name: tensor.to(self.device) for name, tensor in resumed["center"].items()})

    def on_train_epoch_start(self) -> None:
        turn = self.trainer.current_epoch // self.epochs
        if turn == self._turn:
            return
        if self._turn < 0:
            self._first()
        else:
            self._before = self.shares
            self._turn = turn
            self._place(self._soup())
        # A new optimizer and schedule, from X = 0.
        self.trainer.strategy.setup_optimizers(self.trainer)

    def _first(self) -> None:
        """The centre is the equal average of the first ingredients."""
        self._turn = 0
        chosen = self._order(0)
        write(self.net, mean_of(self._some(chosen), self.net))
        self._before = torch.zeros(len(self._samples), self.coefficients.shape[1], dtype=self._wide(), device=self.device)
        self._before[chosen] = 1 / len(chosen)
        self._place(self._soup())

    def _place(self, center: dict[str, Tensor]) -> None:
        """Read the ingredients of this turn, seen from ``center``."""
        self._combination = None  # the old rows must go before the new ones come
        rows = self._rows(self._some(self._order(self._turn)))
        for name, row in rows.items():
            row.sub_(center[name])
        self._combination = Combination(rows, self._block, center)
        self._lengths = self._combination.normalise_(self.eps)

    def _soup(self) -> dict[str, Tensor]:
        return {name: p.to(self._wide(), copy=True) for name, p in parameters_of(self.net).items()}

    def _some(self, positions: Tensor) -> Trajectory:
        return Trajectory([self._samples[i] for i in positions.tolist()])

    def state(self) -> dict[str, Any]:
        center = {name: tensor.cpu() for name, tensor in self._combination.center.items()}
        return {**super().state(), "turn": self._turn, "before": self._before.cpu().clone(), "center": center}
