"""Losses of mixture-of-experts routers, as pure functions of scores (B, N)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import kl_divergence, wide


def expert_targets(y: Tensor, experts: int) -> Tensor:
    """The expert of each label, y mod N (Zhang et al. 2023, arXiv 2308.10110): int64 (B,), or shares (B, N) of mixed labels."""
    if not y.is_floating_point():
        return y % experts
    return y.new_zeros(len(y), experts).index_add(1, torch.arange(y.shape[1], device=y.device) % experts, y)


def class_balance(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the scores and y mod N, a scalar: each expert gets its share of the classes."""
    return F.cross_entropy(scores, expert_targets(y, scores.shape[1]))


def entropy_balance(scores: Tensor) -> Tensor:
    """How far the mean gate softmax(scores) of the batch is from uniform: log N minus its entropy, a scalar in [0, log N]."""
    mean = wide(scores).softmax(1).mean(0)
    return math.log(scores.shape[1]) - torch.special.entr(mean).sum()


def switch_balance(scores: Tensor) -> Tensor:
    """N * sum_e f_e P_e of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), a scalar: 1 where both are uniform.

    f_e is the share of images whose highest score is that of expert e, which has no gradient, and P_e the mean of softmax.
    """
    scores = wide(scores)
    taken = F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype).mean(0)
    return scores.shape[1] * (taken * scores.softmax(1).mean(0)).sum()


def router_loss(scores: Tensor, scores_adv: Tensor, balance: Tensor, alpha: float, beta: float) -> Tensor:
    """AdvMoE's loss of the router (Zhang et al. 2023): alpha * balance + beta * KL(clean || adversarial), a scalar.

    The KL term is summed over experts and averaged over the batch, and the gradient flows through both of its arguments.
    """
    return alpha * balance + beta * kl_divergence(scores_adv, scores).mean()


def routed_divergence(columns: Tensor, logits: Tensor, scores: Tensor) -> Tensor:
    """KL(clean || attacked) of the logits plus that of the scores, (B,): what AdvMoE's attack maximises.

    Args:
        columns: attacked logits and scores side by side, (B, K + N).
        logits: clean logits (B, K).
        scores: clean scores (B, N).
    """
    classes = logits.shape[1]
    return kl_divergence(columns[:, :classes], logits) + kl_divergence(columns[:, classes:], scores)
