"""Standard training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..base import Method
from ..example import Example


class StandardTraining(Method):
    """Cross-entropy on clean samples: the baseline that no attack spares.

    Cost: one forward and one backward pass a step; an ``attack`` that the config may still hold is not run.
    """

    def craft(self, batch: tuple[Tensor, ...]) -> Example:
        return self.clean(batch)

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y)
