"""A public trained network as a class that a config can name."""

from __future__ import annotations

from torch import Tensor, nn

from .zoo import pretrained


class Pretrained(nn.Module):
    """A public network with its weights, by name: ``{class_path: Pretrained, init_args: {name: Rice2020Overfitting}}``.

    Args:
        name: see :func:`pretrained`.

    Raises:
        ValueError: if there is no such name.
        FileNotFoundError: if its file is not there.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = pretrained(name)
        self.train()  # as any module that was just made, see TrainedNet

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) in [0, 1]."""
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before the last linear layer (B, D), where the network gives them."""
        return self.net.forward_features(x)
