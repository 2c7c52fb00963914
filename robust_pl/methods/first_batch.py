"""What a method refuses in its data and its network, before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..callbacks.attacks.checks import check_logits
from ..callbacks.attacks.prepare import prepared


def check_batch(model: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> None:
    """Refuse a batch that a method cannot work with, or a network that does not fit it. Costs one small forward pass.

    Raises:
        TypeError: if the images are not floating point.
        ValueError: if pixels lie outside [0, 1], or labels or logits do not fit ``num_classes``.
    """
    if not x.is_floating_point():
        raise TypeError(f"the data gives images of dtype {x.dtype}: this library needs float pixels in [0, 1]")
    if not (x.isfinite().all() and x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"the data gives pixels from {x.min():.4g} to {x.max():.4g}: scale them to [0, 1], and put the "
            "normalisation into the network (robust_pl.nets.Normalize)"
        )
    if not y.is_floating_point() and not (y.min() >= 0 and y.max() < num_classes):
        raise ValueError(
            f"labels run from {y.min()} to {y.max()} and there are {num_classes} classes: labels must lie in [0, num_classes)"
        )
    with torch.no_grad(), prepared(model, "eval"):
        logits = model(x[:2])
    if logits.dim() == 2 and logits.shape[1] != num_classes:
        raise ValueError(
            f"the network returns {logits.shape[1]} logits and num_classes is {num_classes}: set the network's "
            "num_classes to that of the data, and the method's alike"
        )
    check_logits(logits, y[:2])
