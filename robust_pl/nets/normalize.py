"""Input normalisation as a layer, so that attacks see pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, channel by channel.

    The two constants are buffers of shape (1, C, 1, 1) that follow the network's device but are not in its
    ``state_dict``: the tensor names of published networks stay as they are.

    Args:
        mean: one number a channel, in units of pixels in [0, 1].
        std: one positive number a channel, in the same units.

    Raises:
        ValueError: if the lengths differ, a ``std`` is not positive, or an input has another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise ValueError(f"mean and std need one number a channel each, got {len(mean)} and {len(std)}")
        if not all(s > 0 for s in std):
            raise ValueError(f"every std must be positive, got {tuple(std)}")
        for name, values in (("mean", mean), ("std", std)):
            constant = torch.tensor([float(v) for v in values]).view(1, -1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, H, W) in [0, 1] to the network's own units."""
        # One channel would broadcast against three without a word.
        if x.ndim != 4 or x.shape[1] != self.mean.shape[1]:
            raise ValueError(f"expected an input (B, {self.mean.shape[1]}, H, W), got {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        mean, std = (tuple(round(v, 4) for v in t.flatten().tolist()) for t in (self.mean, self.std))
        return f"mean={mean}, std={std}"


class Standardize(nn.Module):
    """Give every image mean 0 and standard deviation 1 over its own pixels, as Ding et al. 2020 (arXiv:1812.02637) do.

    The deviation is the unbiased one, and at least 1 / sqrt(C H W), so that a flat image stays finite.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, H, W) in [0, 1] to the network's own units."""
        std = x.std(dim=(1, 2, 3), keepdim=True).clamp_min(x[0].numel() ** -0.5)
        return (x - x.mean(dim=(1, 2, 3), keepdim=True)) / std
