"""Random numbers that belong to objects, whichever others are attacked beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..attacks.draws import seed_from


class ObjectDraws:
    """Numbers that are a function of (key, id of the object, what they are for) alone; drawn on the CPU, and moved.

    Args:
        key: what tells these draws from others, such as a seed.
        ids: names of the N objects.
        device: where the numbers are needed.
    """

    def __init__(self, key: int | str, ids: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.key, self.ids, self.device = key, list(ids), torch.device(device)

    def uniform(self, what: str, *shape: int) -> Tensor:
        """Numbers from U[0, 1), float32 (N, *shape), for one purpose."""
        return self._draw(torch.rand, what, shape)

    def normal(self, what: str, *shape: int) -> Tensor:
        """Numbers from N(0, 1), float32 (N, *shape), for one purpose."""
        return self._draw(torch.randn, what, shape)

    def components(self, what: str, weights: Tensor, count: int) -> Tensor:
        """``count`` draws of a component for each distribution of ``weights`` (N, K, C), int64 (N, count, C).

        Stratified: each component comes up its share of times, to within one, in random order. So none is left out by chance.
        """
        columns = weights.shape[2]
        order = self.uniform(f"{what} order", count, columns).argsort(1)
        place = (order + self.uniform(f"{what} place", 1, columns)) / count
        edges = weights.cumsum(1)[:, :-1].mT.contiguous()  # (N, C, K - 1)
        return torch.searchsorted(edges, place.mT.to(edges).contiguous(), right=True).mT

    def _draw(self, source: Callable[..., Tensor], what: str, shape: Sequence[int]) -> Tensor:
        numbers = torch.empty(len(self.ids), *shape)
        generator = torch.Generator()
        for name, slot in zip(self.ids, numbers, strict=True):
            generator.manual_seed(seed_from(self.key, name, what))
            source(slot.shape, generator=generator, out=slot)
        return numbers.to(self.device, non_blocking=True)
