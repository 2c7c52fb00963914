"""Losses of training methods and objectives of attacks, as pure functions.

Logits have shape (B, K). Labels ``y`` are int64 (B,), or float (B, K) where CutMix or label smoothing mixed them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each sample, (B,); ``reference`` are logits (B, K)."""
    target = reference.log_softmax(1)
    return F.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the right one of each sample, (B,): positive where the sample is misclassified.

    The objective of Carlini and Wagner (2017, arXiv 1608.04644) without a floor. Mixed labels count as their largest entry.
    """
    y = hard(y).unsqueeze(1)
    wrong = logits.scatter(1, y, float("-inf")).amax(1)
    return wrong - logits.gather(1, y).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio of each sample, (B,) (Croce and Hein 2020, arXiv 2003.01690).

    The margin divided by the distance of the largest logit to the third largest: neither shifting nor scaling the logits
    changes it, so it keeps a gradient where softmax saturates. Positive where the sample is misclassified.

    Raises:
        ValueError: if there are fewer than three classes.
    """
    check_classes("dlr", logits, 3)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio towards the class ``target`` (B,) of each sample, (B,), see :func:`dlr`.

    Divided by the distance of the largest logit to the mean of the third and the fourth. It is positive where the target beats
    ``y``, which need not mean that the target is predicted.

    Raises:
        ValueError: if there are fewer than four classes.
    """
    check_classes("dlr-targeted", logits, 4)
    top = logits.topk(4, dim=1).values
    own, other = (logits.gather(1, label.unsqueeze(1)).squeeze(1) for label in (hard(y), target))
    return (other - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def check_classes(loss: str, logits: Tensor, needed: int) -> None:
    """Refuse logits of fewer classes than a loss compares."""
    if logits.shape[1] < needed:
        raise ValueError(f"loss={loss!r} needs at least {needed} classes and the network has {logits.shape[1]}: choose 'ce'")


def hard(y: Tensor) -> Tensor:
    """Class indices (B,) of labels that may be mixed, (B, K)."""
    return y.argmax(1) if y.is_floating_point() else y


def trades(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRADES (Zhang et al. 2019, arXiv 1901.08573): CE(clean, y) + beta * KL(clean || adversarial), a scalar.

    The KL term is summed over classes and averaged over the batch, and the gradient flows through both of its arguments.
    """
    return F.cross_entropy(logits, y) + beta * kl_divergence(logits_adv, logits).mean()
