"""Checks of the gradient: that it is there, and that it is the derivative of the network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...functional.losses import cross_entropy, margin
from .evidence import Evidence
from .flag import Flag

_PROBED = 32
_ZERO, _FEW_SAMPLES = 1e-30, 0.01
_DIRECTIONS, _STRIDES = 10, (1e-4, 1e-3, 3e-3)
_MISMATCH = 0.2
_COARSE = "logits of half precision are too coarse for small differences: run the network in float32"
_PIXELS, _NUDGE, _NUDGES, _HALF = 16, 1e-4, 8, 0.5


def zero_gradient(evidence: Evidence) -> Flag:
    """Share of correctly classified samples whose input gradient is zero, NaN or infinite (Carlini et al. 2019, 1902.06705).

    The larger share of cross-entropy and margin, at x: two forward and two backward passes. An attack follows the sign or
    the direction, so a small gradient is none of the matter, and only what float32 cannot hold counts as zero.
    """
    bad = {
        name: torch.cat([_bad(evidence, rows, loss) for rows in evidence.right.split(evidence.batch_size)])
        for name, loss in (("cross-entropy", cross_entropy), ("margin", margin))
    }
    worst = max(bad, key=lambda name: bad[name].sum().item())
    value = bad[worst].float().mean().item()
    return Flag(
        "zero_gradient",
        value > _FEW_SAMPLES,
        value,
        _FEW_SAMPLES,
        f"the gradient of {worst} is zero or not finite at {int(bad[worst].sum())} of the {len(evidence.right)} samples "
        "that are classified correctly",
    )


def _bad(evidence: Evidence, rows: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    y = evidence.y[rows]
    largest = evidence.subject.gradient(evidence.x[rows], lambda logits: loss(logits, y))[0].abs().flatten(1).amax(1)
    return ~(largest > _ZERO) | ~largest.isfinite()


def gradient_mismatch(evidence: Evidence) -> Flag:
    """How far autograd's derivatives of the margin are from finite differences (Carlini et al. 2019, 1902.06705).

    Central differences along 10 random directions of signs, for 32 samples near x, at three strides between 1e-4 and 3e-3:
    one forward and backward pass, and 60 forward passes, each. The relative error of a sample is that of its best stride,
    since large ones meet kinks and small ones rounding; the value is the median over samples.
    """
    if evidence.subject.coarse:
        return Flag("gradient_mismatch", False, None, None, _COARSE)
    x, y, rows = evidence.some(_PROBED)
    draws = evidence.draws("gradient_mismatch", rows)
    # Inside the box, where also a network that clips its input is smooth, and off the grid of 8-bit images.
    x = (x + 0.02 * (draws.uniform(x) - 0.5)).clamp(0.02, 0.98)
    with _full_precision():
        gradient, logits = evidence.subject.gradient(x, lambda logits: margin(logits, y))
        directions = [draws.normal(x).sign() for _ in range(_DIRECTIONS)]
        claimed = torch.stack([(gradient.nan_to_num() * d).flatten(1).sum(1) for d in directions], 1).double()
        errors = []
        for stride in _STRIDES:
            ahead, behind = (
                torch.stack([margin(evidence.predict(x + side * stride * d), y) for d in directions], 1) for side in (1, -1)
            )
            seen = (ahead.double() - behind.double()) / (2 * stride)
            # What rounding of the logits alone may do to a difference quotient.
            noise = 4 * torch.finfo(logits.dtype).eps * logits.abs().amax(1).double() * _DIRECTIONS**0.5 / stride
            size = torch.maximum(torch.maximum(claimed.norm(dim=1), seen.norm(dim=1)), noise)
            errors.append((claimed - seen).norm(dim=1) / size.clamp_min(1e-300))
    value = torch.stack(errors).nan_to_num(1.0).amin(0).median().item()
    return Flag(
        "gradient_mismatch",
        value > _MISMATCH,
        value,
        _MISMATCH,
        f"autograd and finite differences disagree by {value:.1%} (median of {len(x)} samples)",
    )


def piecewise_constant(evidence: Evidence) -> Flag:
    """Share of tiny changes of the image that leave the logits exactly as they were: the network quantises its input.

    Eight times, 16 random pixels of each of 32 samples move by 1e-4: few enough pixels that hardly one crosses a border
    between two levels, and enough that an honest network's logits move. Nine forward passes each.
    """
    if evidence.subject.coarse:
        return Flag("piecewise_constant", False, None, None, _COARSE)
    x, _, rows = evidence.some(_PROBED)
    draws = evidence.draws("piecewise_constant", rows)
    start = evidence.predict(x)
    same = []
    for _ in range(_NUDGES):
        pixels = draws.uniform(x).flatten(1).argsort(1)[:, :_PIXELS]
        signs = draws.normal(x).flatten(1).sign()
        nudge = torch.zeros_like(signs).scatter(1, pixels, _NUDGE * signs.gather(1, pixels))
        same.append((evidence.predict(x + nudge.view_as(x)) == start).all(1))
    value = torch.stack(same).float().mean().item()
    return Flag(
        "piecewise_constant",
        value > _HALF,
        value,
        _HALF,
        f"{value:.0%} of the changes of {_PIXELS} pixels by {_NUDGE:g} leave the logits of {len(x)} samples exactly the same",
    )


def _full_precision() -> AbstractContextManager[None]:
    # TF32 convolutions round to ten bits, more than a small stride changes.
    cudnn = torch.backends.cudnn
    settings = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    return cudnn.flags(**settings, allow_tf32=False)
