"""Weights as a combination of other weights: ``theta = center + sum_i coefficients_i row_i``, and its derivative."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def blocks(sizes: Mapping[str, int], layer_size: int | None) -> dict[str, int]:
    """Number of the block that each tensor belongs to; each block has coefficients of its own.

    Args:
        sizes: elements of each tensor, in the network's order.
        layer_size: None makes one block of everything. Otherwise consecutive tensors are put together until they have more
            than ``layer_size`` elements, so that 0 gives each tensor its own block.
    """
    block, filled, found = 0, 0, {}
    for name, size in sizes.items():
        found[name], filled = block, filled + size
        if layer_size is not None and filled > layer_size:
            block, filled = block + 1, 0
    return found


class Combination:
    """``theta[name] = center[name] + sum_i coefficients[i, block[name]] * rows[name][i]``.

    Cost: one pass over the rows for the weights, and one for the gradient; no backward pass through a network.

    Args:
        rows: name -> the tensor of all b models (b, *shape).
        block: name -> number of its block, in ``range(L)``.
        center: name -> tensor; None is 0.
    """

    def __init__(
        self, rows: Mapping[str, Tensor], block: Mapping[str, int], center: Mapping[str, Tensor] | None = None
    ) -> None:
        self.rows, self.block, self.center = dict(rows), dict(block), center
        self.num_blocks = max(self.block.values()) + 1
        self.num_models = len(next(iter(self.rows.values())))

    def normalise_(self, eps: float = 1e-12) -> Tensor:
        """Scale each row's part in each block to length 1, in place. What is shorter than ``eps``, as where a layer was
        frozen and all models are alike, becomes next to nothing instead of infinite.

        Returns:
            the lengths that were divided by, (b, L).
        """
        squares = self._by_block({name: row.flatten(1).square().sum(1) for name, row in self.rows.items()})
        lengths = squares.sqrt().clamp_min(eps)
        for name, row in self.rows.items():
            row.div_(lengths[:, self.block[name]].view(-1, *[1] * (row.dim() - 1)))
        return lengths

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The combined tensors for ``coefficients`` (b, L)."""
        return {name: self.weight(name, coefficients) for name in self.rows}

    def weight(self, name: str, coefficients: Tensor) -> Tensor:
        """One of them."""
        row = self.rows[name]
        moved = (coefficients[:, self.block[name]].to(row.dtype) @ row.flatten(1)).view(row.shape[1:])
        return moved if self.center is None else moved + self.center[name]

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Derivative by the coefficients, (b, L), from that by the weights; a tensor without one counts as 0."""
        products = {
            name: self.rows[name].flatten(1) @ gradient.flatten().to(self.rows[name].dtype)
            for name, gradient in gradients.items()
            if name in self.rows
        }
        return self._by_block(products)

    def _by_block(self, values: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(self.rows.values()))
        total = torch.zeros(self.num_models, self.num_blocks, dtype=first.dtype, device=first.device)
        for name, value in values.items():
            total[:, self.block[name]] += value
        return total
