"""A zero-shot classifier whose head can be fine-tuned: what WiSE-FT starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .clip_pair import ImageTextPair
from .trained import TrainedNet


class ZeroShotClassifier(nn.Module):
    """An image encoder with a linear head that begins as the zero-shot classifier (Wortsman et al. 2022, arXiv 2109.01903).

    The head's weights are the embeddings of the classes times the scale of the cosines, its bias is zero, and its inputs are
    normalised embeddings of images; so at first its logits are those of the pair. From there on texts have no say: the text
    encoder is frozen, and stays in the state dict. ``{class_path: ZeroShotClassifier, init_args: {pair: {class_path:
    ImageTextPair, init_args: {model: {class_path: OpenClip}, class_names: [cat, dog]}}}}``.

    Args:
        pair: a zero-shot classifier, or a :class:`TrainedNet` that holds one; changed in place.
        class_names: of the K classes; None takes the pair's own.

    Raises:
        TypeError: if it is no pair.
        ValueError: if no class has a name.
    """

    def __init__(self, pair: nn.Module, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        pair = pair.net if isinstance(pair, TrainedNet) else pair
        if not isinstance(pair, ImageTextPair):
            raise TypeError(f"pair is a {type(pair).__name__}: give an ImageTextPair, or a TrainedNet that holds one")
        if class_names is not None:
            pair.class_names = list(class_names)
        pair.freeze_text()
        pair.model.logit_scale.requires_grad_(False)
        self.pair = pair
        with torch.no_grad():
            embeddings = pair.scale * pair.class_embeddings()
            self.head = nn.Linear(embeddings.shape[1], embeddings.shape[0], device=embeddings.device)
            self.head.weight.copy_(embeddings)
            self.head.bias.zero_()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised embeddings (B, d) of pixels (B, 3, H, W) in [0, 1]."""
        return self.pair.encode_image(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, 3, H, W) in [0, 1]."""
        return self.head(self.forward_features(x))
