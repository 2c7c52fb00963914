"""Errors under corruptions, normalised by those of a baseline (Hendrycks and Dietterich 2019, arXiv 1903.12261)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Top-1 errors of AlexNet on ImageNet-C, means over the five severities."""

ALEXNET_CLEAN_ERROR = 0.4348
"""Top-1 error of AlexNet on ImageNet (reconstructed: from common knowledge of torchvision's weights, not from the paper)."""


def corruption_errors(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float]) -> dict[str, float]:
    """CE of each corruption: the sum over severities of its errors, divided by that of the baseline.

    Args:
        errors: corruption -> top-1 error in [0, 1] at each severity.
        baseline: corruption -> mean error of the baseline over the same severities.

    Returns:
        corruption -> CE, 1.0 where both err alike. Their mean is the mCE, mostly printed in per cent. A corruption under which
        the baseline makes no error has none.
    """
    return {name: fmean(row) / baseline[name] for name, row in errors.items() if baseline[name] > 0}


def relative_corruption_errors(
    errors: Mapping[str, Sequence[float]], clean_error: float, baseline: Mapping[str, float], baseline_clean_error: float
) -> dict[str, float]:
    """Relative CE of each corruption: how much errors grow over the clean one, divided by how much the baseline's do.

    Args:
        errors: corruption -> top-1 error in [0, 1] at each severity.
        clean_error: without corruption.
        baseline: corruption -> mean error of the baseline over the same severities.
        baseline_clean_error: without corruption.

    Returns:
        corruption -> relative CE. A corruption under which the baseline's error does not grow has none.
    """
    growth = {name: baseline[name] - baseline_clean_error for name in errors}
    return {name: (fmean(row) - clean_error) / growth[name] for name, row in errors.items() if growth[name] > 0}
