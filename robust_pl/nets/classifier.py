"""What every network here shares: pixels in, normalisation inside, features and a linear head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .normalize import Normalize


class ImageClassifier(nn.Module):
    """A classifier of images (B, C, H, W) with pixels in [0, 1].

    A network derives from this, calls ``super().__init__``, builds its layers under the names its published weights
    have, and defines ``features``; ``head_name`` says which of its layers is the last linear one.

    Args:
        in_channels: the number C of image channels.
        mean: per-channel mean of the pixels, or None for no normalisation.
        std: per-channel standard deviation, or None for no normalisation.

    Raises:
        ValueError: if only one of ``mean`` and ``std`` is given, their length is not C, or an input is no (B, C, H, W).
        TypeError: if an input is not floating point.
    """

    head_name: str = "linear"

    def __init__(self, in_channels: int = 3, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.normalize: nn.Module = nn.Identity()
        if mean is not None and std is not None:
            if len(mean) != in_channels:
                raise ValueError(f"mean and std need one number a channel, {in_channels} in all, got {len(mean)}")
            self.normalize = Normalize(mean, std)
        elif mean is not None or std is not None:
            raise ValueError("give both mean and std, or neither")

    @property
    def head(self) -> nn.Module:
        """The last linear layer, features (B, D) to logits (B, K)."""
        return self.get_submodule(self.head_name)

    def features(self, z: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to features (B, D); a network defines this."""
        raise NotImplementedError(f"{type(self).__name__} must define features(z)")

    def forward_features(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, H, W) in [0, 1] to the features (B, D) that the head reads."""
        return self.features(self.normalize(self.check_input(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, C, H, W) in [0, 1] to logits (B, K)."""
        return self.head(self.forward_features(x))

    def check_input(self, x: Tensor) -> Tensor:
        """Return ``x``, or say in one sentence why it is no batch of images for this network."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__} takes images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point pixels in [0, 1], got {x.dtype}")
        return x
