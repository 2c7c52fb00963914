"""A zero-shot classifier whose head can be fine-tuned: what WiSE-FT starts from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .clip_pair import ImageTextPair
from .reference import places
from .trained import TrainedNet


class ZeroShotClassifier(nn.Module):
    """An image encoder with a linear head that begins as the zero-shot classifier (Wortsman et al. 2022, arXiv 2109.01903).

    The head's weights are the embeddings of the classes times the scale of the cosines, its bias is zero, and its inputs are
    normalised embeddings of images; so at first its logits are those of the pair. From there on texts have no say: the text
    encoder is frozen, and stays in the state dict. ``{class_path: ZeroShotClassifier, init_args: {pair: {class_path:
    ImageTextPair, init_args: {model: {class_path: OpenClip}, class_names: [cat, dog]}}}}``.

    Args:
        pair: a zero-shot classifier, or a :class:`TrainedNet` that holds one; changed in place.
        class_names: of the K classes; or a text file of them, one a line in the order of the labels, as it is or under
            ``ROBUST_PL_DATA``; None takes the pair's own.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if it is no pair.
        ValueError: if no class has a name.
    """

    def __init__(self, pair: nn.Module, class_names: list[str] | str | None = None) -> None:
        super().__init__()
        pair = pair.net if isinstance(pair, TrainedNet) else pair
        if not isinstance(pair, ImageTextPair):
            raise TypeError(f"pair is a {type(pair).__name__}: give an ImageTextPair, or a TrainedNet that holds one")
        if isinstance(class_names, str):
            class_names = [line.strip() for line in _file(class_names).read_text().splitlines() if line.strip()]
        if class_names is not None:
            pair.class_names = list(class_names)
        pair.freeze_text()
        pair.model.logit_scale.requires_grad_(False)
        self.pair = pair.train()  # in eval mode it would learn no statistics
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


def _file(name: str) -> Path:
    found = next((place for place in places(name) if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"class_names={name!r} is no file, here or under ROBUST_PL_DATA: write one name a line, or give a list of names"
        )
    return found
