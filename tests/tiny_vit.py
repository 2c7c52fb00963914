"""The smallest vision transformer that has all parts of one: blocks, and parameters outside of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, z: Tensor) -> Tensor:
        h = self.norm1(z)
        z = z + self.attention(h, h, h, need_weights=False)[0]
        return z + self.mlp(self.norm2(z))


class TinyViT(nn.Module):
    """Of images (B, 1, 8, 8), in 16 patches."""

    def __init__(self, num_classes: int = 10, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(len(z), -1, -1), z], 1) + self.positions
        for block in self.blocks:
            z = block(z)
        return self.head(self.norm(z)[:, 0])
