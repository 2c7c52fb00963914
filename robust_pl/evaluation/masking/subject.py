"""The network as the checks see it, which may be broken in any way that still gives logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...functional.gradients import input_gradient

Classifier = Callable[[Tensor], Tensor]


class Subject(nn.Module):
    """A network that attacks can always be run on.

    A network that is cut off from its input gets a gradient of zero instead of an error, and gradients that are NaN count as
    zero while an attack runs; :meth:`gradient` shows them. The network is no submodule, so that an attack cannot change its
    modes: what is attacked is what is evaluated.

    Args:
        net: maps pixels (B, C, H, W) to (B, K).
        batch_size: images that go through it at once where no gradient is asked for.
        dtype: what it is fed with; None for images as they come.

    Attributes:
        coarse: whether its outputs have less precision than float32, too little for small differences.
    """

    def __init__(self, net: Classifier, batch_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._net = (net,)
        self.batch_size, self.dtype = batch_size, dtype
        self.coarse = False

    def forward(self, x: Tensor) -> Tensor:
        z = x.view_as(x)
        if z.requires_grad and torch.is_grad_enabled():
            z.register_hook(lambda gradient: gradient.nan_to_num())
        return self._outputs(z)

    def predict(self, x: Tensor) -> Tensor:
        """Outputs without a graph, (n, C, H, W) -> (n, K), in batches."""
        with torch.no_grad():
            return torch.cat([self._outputs(part) for part in x.split(self.batch_size)])

    def gradient(self, x: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Gradient of ``objective(outputs) -> (B,)`` as autograd gives it, NaN included, and the outputs."""
        return input_gradient(self._outputs, x, objective)

    def _outputs(self, x: Tensor) -> Tensor:
        outputs = self._net[0](x.to(self.dtype or x.dtype))
        wide = torch.promote_types(outputs.dtype, torch.float32)
        self.coarse = outputs.dtype != wide
        return outputs.to(wide) + 0 * x.flatten(1)[:, :1]
