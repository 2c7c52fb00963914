"""Encoders of images and texts that train in a minute on a CPU."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier

_WORD = re.compile(r"[a-z0-9]+")


class TinyClip(nn.Module):
    """A small convolutional image encoder and a bag of words, for tests and small data; 140 thousand parameters.

    A text is the mean of its words' vectors, mapped linearly; order and upper case do not matter. A word is one of
    ``vocabulary`` vectors by the CRC-32 of its letters, so that there is no list of words to keep, and any two words share one
    with a probability of 1 / vocabulary. ``logit_scale`` starts at log(1 / 0.07), as CLIP's does.

    Args:
        in_channels: channels C of images.
        width: channels behind the first of three convolutions of stride 2; the others have two and four times as many.
        dim: of the embeddings, d.
        vocabulary: number of word vectors.
        words: of a text that count, L; those behind them are left out.

    Raises:
        ValueError: if an argument is below 1, or a text has no word.
    """

    def __init__(self, in_channels: int = 3, width: int = 16, dim: int = 64, vocabulary: int = 1024, words: int = 32) -> None:
        super().__init__()
        arguments = {"in_channels": in_channels, "width": width, "dim": dim, "vocabulary": vocabulary, "words": words}
        for name, value in arguments.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.visual = TinyImageEncoder(in_channels, width, dim)
        self.word = nn.Embedding(vocabulary + 1, dim, padding_idx=0)
        self.text_projection = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.vocabulary, self.words = vocabulary, words

    def encode_image(self, x: Tensor) -> Tensor:
        """Embeddings (B, d) of pixels (B, C, H, W) in [0, 1]."""
        return self.visual(x)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, d) of tokens (B, L), of which 0 is no word."""
        count = (tokens > 0).sum(1, keepdim=True).clamp_min(1)
        return self.text_projection(self.word(tokens).sum(1) / count)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 (B, L): a number from 1 for each word, then zeros."""
        tokens = torch.zeros(len(texts), self.words, dtype=torch.int64)
        for row, text in enumerate(texts):
            numbers = [1 + zlib.crc32(word.encode()) % self.vocabulary for word in _WORD.findall(text.lower())][: self.words]
            if not numbers:
                raise ValueError(f"the text {text!r} has no word: give one with letters or digits")
            tokens[row, : len(numbers)] = torch.tensor(numbers)
        return tokens


class TinyImageEncoder(ImageClassifier):
    """Four convolutions, the mean over the image, and two linear layers, ``hidden`` and ``projection``.

    GroupNorm, so that an encoder that is frozen or in evaluation computes what it does in training.

    Args:
        in_channels: channels C of images.
        width: channels behind the first convolution.
        dim: of the embeddings, d.
    """

    head_name = "projection"

    def __init__(self, in_channels: int, width: int, dim: int) -> None:
        super().__init__(in_channels)
        widths = [in_channels, width, 2 * width, 4 * width, 4 * width]
        blocks: list[nn.Module] = []
        for place, (a, b) in enumerate(pairwise(widths)):
            blocks += [nn.Conv2d(a, b, 3, 2 if place < 3 else 1, 1, bias=False), nn.GroupNorm(math.gcd(4, b), b), nn.GELU()]
        self.blocks = nn.Sequential(*blocks)
        self.hidden = nn.Linear(4 * width, 4 * width)
        self.projection = nn.Linear(4 * width, dim)

    def features(self, z: Tensor) -> Tensor:
        return nn.functional.gelu(self.hidden(self.blocks(z).mean((2, 3))))
