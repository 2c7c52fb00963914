"""What an attack refuses, and how it says so."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from ...functional.geometry import Norm
from ...functional.losses import hard
from ...functional.ratio import Ratio

Number = Ratio | float
RandomStart = bool | Literal["normal", "bernoulli"]
RANDOM_STARTS: tuple[RandomStart, ...] = (False, True, "normal", "bernoulli")
DEFAULT_EPS = Ratio("8/255")
_BOX_TOLERANCE = 1e-6
_SOFTMAX_TOLERANCE = 1e-4

COMPLAINTS = {
    "input": "{attack} was given images with values outside [0, 1] or NaN{found}: scale pixels to [0, 1] in the data, and put "
    "the normalisation into the network (robust_pl.nets.Normalize)",
    "gradient": "{attack} met gradients that are NaN or infinite{found}: check the network, whose loss may have diverged, and "
    "the precision",
    "result": "{attack} returned values outside [0, 1] or NaN{found}: end perturb() with problem.project(x_adv)",
    "ball": "{attack} left its ball{found}: end perturb() with problem.project(x_adv)",
}


def check_eps(eps: Number | Tensor, norm: Norm, *, values: bool = True) -> Ratio | Tensor:
    """Refuse a radius that cannot be meant, and warn of one that hardly can.

    Args:
        eps: a number, or a tensor of any shape.
        norm: which ball.
        values: whether to look at those of a tensor, for which a GPU must wait.

    Raises:
        ValueError: if eps is negative, not finite, or above 1 for linf.
    """
    if isinstance(eps, Tensor):
        wrong = values and (not (torch.isfinite(eps).all() and (eps >= 0).all()) or (norm == "linf" and (eps > 1).any()))
        if wrong:
            raise ValueError("eps holds values that are negative, NaN or above 1: pixels lie in [0, 1], so write 8/255")
        return eps
    eps = eps if isinstance(eps, Ratio) else Ratio(eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} must be a finite number of at least 0, such as 8/255")
    if norm == "linf" and eps > 1:
        meant = f": did you mean {eps:g}/255?" if eps <= 255 else ""
        raise ValueError(f"eps={eps} is above 1, and pixels lie in [0, 1]{meant}")
    if norm == "l2" and eps >= 8 and float(eps).is_integer():
        warnings.warn(f"eps={eps} is a very large l2 radius for pixels in [0, 1]: did you mean {eps:g}/255?", stacklevel=3)
    return eps


def check_step_size(step_size: Number | None) -> Ratio | None:
    """Refuse a step that does not move.

    Raises:
        ValueError: if step_size is not a finite number above 0.
    """
    if step_size is None:
        return None
    step_size = step_size if isinstance(step_size, Ratio) else Ratio(step_size)
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size={step_size} must be above 0, such as 2/255; leave it out for the default")
    return step_size


def check_kl(random_start: RandomStart, targeted: bool) -> None:
    """Refuse ways in which the divergence from the clean prediction cannot be raised."""
    if targeted:
        raise ValueError("objective='kl' has no target to reach: choose 'ce' or 'margin', or targeted=False")
    if not random_start:
        raise ValueError("objective='kl' has no gradient at x itself: set random_start=True or 'normal'")


def check_count(field: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}={value} must be a whole number of at least 1")


def choose(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{field}={value!r} is unknown: choose one of {', '.join(choices)}")


def outside_box(x: Tensor) -> Tensor:
    """Whether any pixel lies outside of [0, 1] or is NaN, a bool tensor ()."""
    # A comparison with NaN is false, so "all inside" also asks for finite values.
    return ~((x >= -_BOX_TOLERANCE) & (x <= 1 + _BOX_TOLERANCE)).all()


def outside_ball(norms: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Whether any perturbation, of size ``norms`` (B,), is larger than eps, a bool tensor ()."""
    allowed = eps.flatten() if isinstance(eps, Tensor) else eps
    # Rounding of x + delta: one unit in the last place of 1 for linf, its sum over pixels for the others.
    slack = 1e-6 if norm == "linf" else 1e-6 + 1e-4 * allowed
    return (norms > allowed + slack).any()


def check_shapes(x: Tensor, y: Tensor) -> None:
    """Refuse what is not a batch of images with labels."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {what}: an attack needs float pixels (B, C, H, W) in [0, 1]")
    if not len(x):
        raise ValueError("x holds no image: an attack needs at least one")
    if not isinstance(y, Tensor) or y.dim() not in (1, 2) or len(y) != len(x):
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is {what} for {len(x)} samples: an attack needs labels (B,), or (B, K) if mixed")
    if (y.dim() == 1 and y.dtype != torch.int64) or (y.dim() == 2 and not y.is_floating_point()):
        raise TypeError(f"y has dtype {y.dtype}: labels are int64 (B,), or float (B, K) if mixed")


def per_sample_eps(eps: Tensor, x: Tensor) -> Tensor:
    """``eps`` for this batch, (B, 1, 1, 1) or a scalar, on its device."""
    if eps.dim() and eps.shape not in ((len(x), 1, 1, 1), (1, 1, 1, 1)):
        raise ValueError(f"eps has shape {tuple(eps.shape)}: per-sample eps for this batch is ({len(x)}, 1, 1, 1)")
    eps = eps.to(x.device, torch.promote_types(x.dtype, torch.float32))
    return eps.expand(len(x), 1, 1, 1) if eps.dim() else eps


def check_logits(logits: Tensor, y: Tensor, *, values: bool = True) -> None:
    """Refuse what is not a matrix of logits (B, K) for labels ``y``.

    Raises:
        TypeError: if the network returns no tensor.
        ValueError: if the shape is wrong, a label has no logit, or the values are probabilities.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the network returned a {type(logits).__name__}: an attack needs a tensor of logits (B, K)")
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"the network returned shape {tuple(logits.shape)} for {len(y)} samples: logits are (B, K)")
    if y.dim() == 2 and y.shape[1] != logits.shape[1]:
        raise ValueError(f"mixed labels have {y.shape[1]} classes and the logits {logits.shape[1]}: set num_classes")
    if not values:
        return
    if not hard(y).min() >= 0 or not hard(y).max() < logits.shape[1]:
        raise ValueError(
            f"labels run from {hard(y).min().item()} to {hard(y).max().item()} and the network has {logits.shape[1]} logits: "
            "labels must lie in [0, number of classes); check the data's labels and num_classes"
        )
    if looks_like_softmax(logits.detach()):
        raise ValueError(
            "the network's output sums to 1 and has no negative entry: it looks like softmax, whose gradients vanish "
            "where the network is sure; return logits instead"
        )


def looks_like_softmax(logits: Tensor) -> bool:
    """Whether every row of (B, K) is a probability vector."""
    if logits.shape[1] < 2:
        return False
    sums = logits.float().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() < _SOFTMAX_TOLERANCE).all())
