"""An attack as a part of an analysis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attacks.base import Attack
from .base import Analysis


def check_attack(attack: Attack | None, analysis: str) -> Attack | None:
    """Refuse an attack that an analysis cannot run on single batches.

    Raises:
        ValueError: if it must see training data first.
    """
    if attack is not None and attack.must_fit:
        raise ValueError(f"{type(attack).__name__} must see training data first, which {analysis} does not show it: take PGD")
    return attack


def attack_name(attack: Attack) -> str:
    """What a reader calls it."""
    return attack.name or type(attack).__name__


def under_attack(
    analysis: Analysis, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, classes: int
) -> Tensor:
    """Adversarial pixels of a batch, (B, C, H, W) float32 or wider; what it costs is counted as the analysis's.

    Args:
        analysis: that asks.
        attack: its random numbers belong to the samples.
        model: in eval mode.
        x: pixels.
        y: labels.
        index: positions of the samples.
        classes: number K of logits.
    """
    found = attack.run(model, x, attack.aim(y, classes, index), index=index)
    analysis.forwards += found.forwards
    analysis.add(attack_backwards=torch.tensor(float(found.backwards)))
    return found.x_adv
