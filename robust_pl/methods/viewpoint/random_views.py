"""Training on random views."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.hashing import uniform
from .rendered_views import RenderedViews


class RandomViewTraining(RenderedViews):
    """Views spread uniformly over the space: the ``random`` baseline of VIAT (Ruan et al. 2023, arXiv 2307.10235).

    Arguments, costs and errors are those of :class:`RenderedViews`.
    """

    def sample_views(self, which: Tensor, keys: Tensor) -> Tensor:
        return self._space.uniform(uniform(keys.unsqueeze(1), torch.arange(self._space.dim)))
