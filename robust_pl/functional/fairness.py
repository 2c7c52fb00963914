"""What methods and reports need to know of single classes, as pure functions of tensors.

Nothing here waits for the device, so that a training step may call it.
"""

from __future__ import annotations

import math

from torch import Tensor

from .losses import wide


def class_sums(values: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums of per-sample values by class, and how many samples each class has.

    Both add up over batches and processes. Half precision is summed in float32, and no gradient flows.

    Args:
        values: one or several figures of each sample, (B,) or (B, C), such as its adversarial and its clean cross-entropy.
        y: class of each sample, int64 (B,); or shares (B, K) where CutMix or label smoothing mixed them, and then a sample
            counts for each of its classes by its share.
        num_classes: number of classes K.

    Returns:
        Sums (K, C) and counts (K,), in the dtype of the sums.

    Raises:
        ValueError: if the shapes do not agree.
    """
    values = wide(values.detach())
    values = values.unsqueeze(1) if values.dim() == 1 else values
    mixed = y.is_floating_point()
    if values.dim() != 2 or y.dim() != 1 + mixed or len(y) != len(values) or (mixed and y.shape[1] != num_classes):
        raise ValueError(
            f"values {tuple(values.shape)} and y {tuple(y.shape)} of {num_classes} classes do not agree: "
            "give values (B,) or (B, C), and y (B,) or shares (B, K)"
        )
    if mixed:
        shares = y.to(values.dtype)
        # A matrix product would be rounded to TF32 where that is allowed.
        return (shares.unsqueeze(2) * values.unsqueeze(1)).sum(0), shares.sum(0)
    sums = values.new_zeros(num_classes, values.shape[1]).index_add_(0, y, values)
    return sums, values.new_zeros(num_classes).index_add_(0, y, values.new_ones(len(y)))


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Means by class (K, C) of what :func:`class_sums` gave; nan for a class without samples."""
    return sums / counts.unsqueeze(1)


def class_gaps(means: Tensor) -> Tensor:
    """How far each class lies above the mean over all classes, (K, C): positive for hard classes where the means are errors.

    A class without samples (nan) is left out of the mean, and its own gap is 0.
    """
    return (means - means.nanmean(0)).nan_to_num(0.0, 0.0, 0.0)


def worst_class(accuracy: Tensor) -> Tensor:
    """Smallest of the class accuracies (..., K), one or more classes."""
    return accuracy.amin(-1)


def worst_tenth(accuracy: Tensor) -> Tensor:
    """Mean of the ceil(K / 10) smallest class accuracies (..., K); up to ten classes that is the worst one."""
    count = math.ceil(accuracy.shape[-1] / 10)
    return accuracy.topk(count, dim=-1, largest=False).values.mean(-1)


def nsd(accuracy: Tensor) -> Tensor:
    """Normalised standard deviation of the class accuracies (..., K): population standard deviation over mean.

    0 where all classes fare alike, at most sqrt(K - 1), where one class alone is ever right; nan where none is. That it is
    this that Zhao et al. 2023 (ABSLD, arXiv 2312.05508) report is taken from summaries of the paper.
    """
    return accuracy.std(-1, correction=0) / accuracy.mean(-1)
