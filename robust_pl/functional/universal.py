"""What is measured of universal perturbations, from predicted classes (N,) and logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fooling_rate(clean: Tensor, attacked: Tensor) -> Tensor:
    """Share of samples whose prediction changes (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401): labels do not matter.

    Args:
        clean: classes predicted for the images (N,).
        attacked: classes predicted for the perturbed images (N,).
    """
    return (clean != attacked).double().mean()


def dominant_classes(attacked: Tensor, k: int) -> Tensor:
    """The ``k`` most frequent of the classes (N,), the most frequent first; of equally frequent ones the smaller first."""
    return torch.bincount(attacked).argsort(descending=True, stable=True)[:k]


def dominance_ratio(attacked: Tensor, k: int = 1) -> Tensor:
    """Share of the perturbed images whose prediction is among the ``k`` most frequent (Ye et al. 2022, arXiv 2209.13113).

    Every image counts once; the authors' code counts one whose largest logits tie for each of them.
    """
    return torch.bincount(attacked).topk(min(k, int(attacked.max()) + 1)).values.sum() / len(attacked)


def own_class(classifier: Callable[[Tensor], Tensor], delta: Tensor, background: Tensor) -> Tensor:
    """The class of the perturbation itself, on a plain ground, an int64 tensor ().

    FG-UAP takes ImageNet's mean colour, which the normalisation of most networks maps to zero.

    Args:
        classifier: maps pixels in [0, 1] to logits.
        delta: perturbation (1, C, H, W).
        background: pixels that broadcast to it, such as the mean colour (1, C, 1, 1).
    """
    return classifier((background + delta).clamp(0.0, 1.0)).argmax(1).squeeze(0)
