"""Low-rank additions to frozen layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TARGETS = ("attn", "qkv")


@dataclass(frozen=True)
class LoRA:
    """``W + alpha / r * B A`` in the place of weights W (Hu et al. 2021, arXiv 2106.09685); A (r, in), B (out, r).

    Only A and B train, and B starts at 0, so that at first nothing changes. No dropout. The layers keep their names, so weights
    of the network before fit it afterwards; those added are called ``lora_A`` and ``lora_B``. The packed projection to queries,
    keys and values of a :class:`torch.nn.MultiheadAttention` gets one pair, as in the authors' code of Omniview-Tuning (Ruan et
    al. 2024, arXiv 2404.12139), which rewrites the attention for it.

    Args:
        rank: r.
        alpha: of the factor alpha / r.
        targets: last parts of the names of layers, each a Linear or a MultiheadAttention: ``attn`` is that of open_clip's
            transformers, ``qkv`` that of timm's.

    Raises:
        ValueError: if an argument is out of range.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: Sequence[str] = _TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not self.targets:
            raise ValueError("targets is empty: name the layers that get low-rank weights, such as qkv")

    def add_to(self, module: nn.Module) -> list[str]:
        """Freeze ``module``, give its target layers low-rank weights, in place, and return the names of those layers.

        Raises:
            ValueError: if it has none.
        """
        module.requires_grad_(False)
        found = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.MultiheadAttention)}
        chosen = [name for name in found if name.rpartition(".")[2] in self.targets]
        if not chosen:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in found})) or "none"
            raise ValueError(
                f"targets={list(self.targets)} names no layer of the image encoder, whose linear ones are: {there}"
            )
        for name in chosen:
            kind = LoRALinear if isinstance(found[name], nn.Linear) else LoRAAttention
            module.set_submodule(name, kind(found[name], self.rank, self.alpha))
        return chosen


class LoRALinear(nn.Linear):
    """A linear layer with low-rank weights beside its own, which are taken over."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = _low_rank(layer.weight, rank)
        self.factor = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.factor * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter((self.weight + self.factor * self.lora_B @ self.lora_A).detach())
        layer.bias = self.bias
        return layer


class LoRAAttention(nn.MultiheadAttention):
    """Multi-head attention with low-rank weights beside its packed projection, which is taken over.

    Raises:
        ValueError: if queries, keys and values have projections of their own.
    """

    def __init__(self, layer: nn.MultiheadAttention, rank: int, alpha: float) -> None:
        if layer.in_proj_weight is None:
            raise ValueError("LoRA: keys and values of an attention have other sizes than queries: leave it out of targets")
        super().__init__(
            layer.embed_dim,
            layer.num_heads,
            layer.dropout,
            bias=layer.in_proj_bias is not None,
            add_bias_kv=layer.bias_k is not None,
            add_zero_attn=layer.add_zero_attn,
            batch_first=layer.batch_first,
            device="meta",
        )
        for name in ("in_proj_weight", "in_proj_bias", "out_proj", "bias_k", "bias_v"):
            setattr(self, name, getattr(layer, name))
        self.lora_A, self.lora_B = _low_rank(layer.in_proj_weight, rank)
        self.factor = alpha / rank
        # torch's transformer layers would in evaluation read in_proj_weight themselves and never come here.
        self._qkv_same_embed_dim = False

    @property
    def _whole(self) -> Tensor:
        return self.in_proj_weight + self.factor * self.lora_B @ self.lora_A

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self._whole,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return out.transpose(0, 1) if self.batch_first else out, weights

    def merged(self) -> nn.MultiheadAttention:
        """A plain attention that computes the same."""
        layer = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, add_zero_attn=self.add_zero_attn, batch_first=self.batch_first
        )
        for name in ("in_proj_bias", "out_proj", "bias_k", "bias_v"):
            setattr(layer, name, getattr(self, name))
        layer.in_proj_weight = nn.Parameter(self._whole.detach())
        return layer.train(self.training)


def merge(module: nn.Module) -> nn.Module:
    """Put plain layers that compute the same in the place of those with low-rank weights; in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoRALinear | LoRAAttention):
            module.set_submodule(name, layer.merged())
    return module


def _low_rank(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    out_features, in_features = weight.shape
    a = torch.empty(rank, in_features, dtype=weight.dtype, device=weight.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return nn.Parameter(a), nn.Parameter(weight.new_zeros(out_features, rank))
