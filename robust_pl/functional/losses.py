"""Losses of training methods and objectives of attacks, as pure functions.

Logits have shape (B, K). Labels ``y`` are int64 (B,), or float (B, K) where CutMix or label smoothing mixed them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def hard_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample with its hard label, (B,): mixed or smoothed labels count as their largest entry."""
    return F.cross_entropy(logits, hard(y), reduction="none")


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


def mart(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """MART (Wang et al. 2020, openreview rklOg6EFwS): boosted CE + beta * KL(clean || adversarial) * (1 - p_y), a scalar.

    With q the adversarial and p the clean probabilities, the boosted cross-entropy is -log q_y - log(1.0001 - max q_k + 1e-12)
    over wrong classes k. As in the authors' code, the weight is 1.0000001 - p_y, log(q + 1e-12) enters the divergence, and no
    gradient is stopped: it flows through both logits and through the weight. Mixed labels count as their largest entry. Half
    precision, in which 1.0001 is 1, is computed in float32.
    """
    p, q = wide(logits).softmax(1), wide(logits_adv).softmax(1)
    label = hard(y).unsqueeze(1)
    wrong = q.scatter(1, label, -1.0).amax(1)
    boosted = F.cross_entropy(wide(logits_adv), label.squeeze(1)) - (1.0001 - wrong + _TINY).log().mean()
    divergence = F.kl_div((q + _TINY).log(), p, reduction="none").sum(1)
    return boosted + beta * (divergence * (1.0000001 - p.gather(1, label).squeeze(1))).mean()


FourierMode = Literal["batch2d", "class1d"]
FOURIER_MODES: tuple[FourierMode, ...] = ("batch2d", "class1d")
Distance = Literal["l1", "l2", "cosine"]
DISTANCES: tuple[Distance, ...] = ("l1", "l2", "cosine")


def frequency_regularization(logits: Tensor, logits_adv: Tensor, mode: FourierMode = "batch2d") -> Tensor:
    """Frequency regularization (Huang et al. 2022, arXiv 2212.12732): mean |Re| and |Im| of the spectrum of the difference.

    The transform is not normalised, and the mean is over all real and imaginary parts. ``batch2d``, that of the authors' code,
    transforms the matrix (B, K) along both axes, so its size grows with the square root of the batch; ``class1d``, that of the
    paper's text, transforms each sample's logits by itself. The gradient flows through both arguments. Half precision, for
    which there is no transform, is computed in float32.
    """
    return spectral_distance(logits, logits_adv, mode, "l1")


def spectral_distance(outputs: Tensor, outputs_adv: Tensor, mode: FourierMode, distance: Distance) -> Tensor:
    """Distance between the spectra of two outputs (B, K), a scalar.

    ``l1`` and ``l2`` are means of absolute and squared differences over all real and imaginary parts; by Parseval's theorem l2
    is that of the outputs themselves times K / 2, or B K / 2 for ``batch2d``. ``cosine`` is one minus the cosine between the
    spectra as real vectors, of each sample for ``class1d`` and of the whole batch for ``batch2d``.
    """
    if distance == "cosine":
        start = 0 if mode == "batch2d" else 1
        a, b = (torch.view_as_real(_spectrum(wide(t), mode)).flatten(start) for t in (outputs, outputs_adv))
        return 1 - F.cosine_similarity(a, b, dim=-1).mean()
    parts = torch.view_as_real(_spectrum(wide(outputs) - wide(outputs_adv), mode))
    return parts.abs().mean() if distance == "l1" else parts.square().mean()


def _spectrum(outputs: Tensor, mode: FourierMode) -> Tensor:
    return torch.fft.fft2(outputs) if mode == "batch2d" else torch.fft.fft(outputs, dim=1)


def wide(t: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
