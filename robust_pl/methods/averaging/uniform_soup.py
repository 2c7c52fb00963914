"""Uniform soup."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...callbacks.attacks.base import Attack
from .assembled import Assembled
from .ingredients import Ingredients, mean_of, read_ingredients, write


class UniformSoup(Assembled):
    """Equal average of all ingredients (Wortsman et al. 2022, arXiv 2203.05482), fine-tuned from the same pre-trained weights.

    Cost: no training; BatchNorm's statistics take ``batches`` forward passes, and the attack's where there is one.

    Args:
        ingredients: folder or list of weights, see :func:`.ingredients.read_ingredients`.
        skip: leave out so many of the first, such as a trajectory's beginning.
        attack: attacks the images that BatchNorm's statistics are computed again from; None takes clean ones.
        batches: for these statistics, training batches of each process; 0 averages the ingredients' statistics instead, which
            are those of other activations than the soup's.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if there are fewer than two ingredients, or they are not all of ``net``.
    """

    def __init__(
        self,
        net: nn.Module,
        ingredients: Ingredients,
        attack: Attack | None = None,
        skip: int = 0,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, batches, num_classes)
        self.ingredients, self.skip = ingredients, skip

    def check(self) -> None:
        self._samples = read_ingredients(self.ingredients, self.net, self.skip)

    def assemble(self) -> dict[str, Any]:
        write(self.net, mean_of(self._samples, self.net))
        count = len(self._samples)
        return {"ingredients": [s.label for s in self._samples], "shares": torch.full((count, 1), 1 / count)}
