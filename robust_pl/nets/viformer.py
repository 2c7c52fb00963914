"""The head of Omniview-Tuning."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class VIFormer(nn.Module):
    """``z + 0.1 f(z)``, normalised: the head of Omniview-Tuning (Ruan et al. 2024, arXiv 2404.12139) on image embeddings.

    f is a transformer encoder (2 layers, 4 heads, 2048 hidden units, normalisation behind each part). As in the authors' code
    the samples of a batch stand along its batch axis, so that each is a sequence of one token: the softmax over one token is 1,
    attention is the linear map of its values, and f in effect a residual MLP of each sample alone, whatever else is in
    the batch. The paper writes ``0.1 f(z) + 0.9 z``; the code adds, and so does this. z comes as the encoder
    gives it, not normalised: f(z) has norm sqrt(d) at the start, beside which z must not be short. No dropout.

    Args:
        dim: of embeddings, d; divisible by ``heads``. 512 for ViT-B, 768 for ViT-L.
        layers: of f.
        heads: of its attention.
        hidden: units of its feed-forward parts.
        factor: of f(z).

    Raises:
        ValueError: if ``dim`` is not divisible by ``heads``.
    """

    def __init__(self, dim: int, layers: int = 2, heads: int = 4, hidden: int = 2048, factor: float = 0.1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"VIFormer: embeddings of dimension {dim} cannot be shared out to {heads} heads: change heads")
        layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        """Normalised embeddings (B, d) of an encoder's embeddings (B, d)."""
        return F.normalize(z + self.factor * self.encoder(z.unsqueeze(0)).squeeze(0), dim=1)
