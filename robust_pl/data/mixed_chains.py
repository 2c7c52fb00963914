"""The frame in which AugMix and PRIME mix an image with several changed versions of itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .augmentations import Augmentation
from .beta import Beta, Dirichlet
from .hashing import hash_keys, integers, uniform

MAX_DEPTH = 3
_SKIP, _WEIGHTS, _CHAINS = 0, 1, 1_000
_DEPTH, _OPERATION, _STEPS = 0, 1, 1_000


class MixedChains(Augmentation):
    """An image mixed with several chains of operations on it (Hendrycks et al. 2020, arXiv 1912.02781), over any operations.

    x_aug = (1 - m) x + m * sum_i w_i chain_i(x), with w ~ Dirichlet(alpha, ..., alpha) and m ~ Beta(alpha, alpha). A chain is 1
    to 3 operations in a row, drawn with replacement, each as likely; labels stay. Every sample draws all of it for itself, by
    its key.

    On a GPU each step runs every operation on the whole batch, and a sample keeps what it drew, so that no device waits; on a
    CPU an operation runs on the samples that drew it alone.

    Args:
        operations: augmentations that leave labels as they are.
        width: chains, at least 1.
        depth: operations in each; None draws 1, 2 or 3 for each chain of each sample.
        alpha: of both distributions, above 0; 1 draws uniformly.

    Raises:
        ValueError: if an argument is out of range, there is no operation, or one mixes labels.
    """

    def __init__(
        self, operations: Sequence[Augmentation], width: int = 3, depth: int | None = None, alpha: float = 1.0
    ) -> None:
        if not operations:
            raise ValueError("operations is empty: name at least one augmentation")
        for one in operations:
            if one.mixes_labels:
                raise ValueError(f"{type(one).__name__} mixes labels, and a chain keeps them: put it into the list augment")
        if width < 1:
            raise ValueError(f"width={width} is the number of chains: it must be at least 1")
        if depth is not None and depth < 1:
            raise ValueError(f"depth={depth} is the number of operations in a chain: take at least 1, or none to draw it")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha} must be a number above 0")
        self.operations, self.width, self.depth = list(operations), width, depth
        self._skip, self._weights = Beta(alpha, alpha), Dirichlet(alpha, width)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        w, m = self.weights(keys)
        return mixed(x, self.chains(x, y, keys), w.to(x.dtype), m.to(x.dtype)), y

    def weights(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Shares w (width, B) of the chains, which sum to 1, and share m (B,) of all of them; float64."""
        return self._weights(keys, _WEIGHTS), self._skip(uniform(keys, _SKIP))

    def chains(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """The images after each chain, (width, B, C, H, W) in the dtype of ``x``; arguments as :meth:`__call__`."""
        keys = hash_keys(keys, _CHAINS + torch.arange(self.width, device=keys.device).unsqueeze(1)).flatten()
        out, y = x.repeat(self.width, 1, 1, 1), y.repeat(self.width, *[1] * (y.dim() - 1))
        depth = integers(keys, _DEPTH, MAX_DEPTH) + 1
        for step in range(self.depth or MAX_DEPTH):
            step_keys = hash_keys(keys, _STEPS + step)
            chosen = integers(step_keys, _OPERATION, len(self.operations))
            if self.depth is None:
                chosen = torch.where(step < depth, chosen, -1)
            before = out
            for number, operation in enumerate(self.operations):
                out = _where(chosen == number, operation, before, out, y, hash_keys(step_keys, _STEPS + number))
        return out.unflatten(0, (self.width, len(x)))


def mixed(x: Tensor, chains: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """``(1 - m) x + m * sum_i w_i chains_i``, differentiable in w and m.

    Args:
        x: (B, C, H, W).
        chains: (width, B, C, H, W).
        w: (width, B).
        m: (B,).
    """
    m = m.view(-1, 1, 1, 1)
    return (1 - m) * x + m * (w[..., None, None, None] * chains).sum(0)


def _where(rows: Tensor, operation: Augmentation, before: Tensor, out: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """``out`` with the operation on ``before`` at the given rows, bool (B,)."""
    if before.device.type == "cpu":  # where it makes nothing wait to know how many there are
        at = rows.nonzero().squeeze(1)
        return out.index_copy(0, at, operation(before[at], y[at], keys[at])[0]) if len(at) else out
    return torch.where(rows.view(-1, 1, 1, 1), operation(before, y, keys)[0], out)
