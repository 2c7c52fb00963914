"""Signals of catastrophic overfitting on a batch, and what they are over all batches and processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from ...functional.geometry import Norm
from ..attacks.fgsm import FGSM
from ..attacks.pgd import PGD

_SHARES = {
    "clean": "samples",
    "noise": "samples",
    "fgsm": "samples",
    "pgd": "samples",
    "self_alone": "samples",
    "self_other": "others",
    "cosine": "gradients",
}
_KEYS = (*_SHARES, "samples", "others", "gradients")
SIGNALS = len(_KEYS)
"""Length of what :func:`co_sums` returns."""
_GREY = 0.5


def co_sums(
    model: nn.Module, x: Tensor, y: Tensor, index: Tensor, *, eps: float, norm: Norm, step_size: float, steps: int
) -> Tensor:
    """Numerators and denominators of the signals on a batch, (SIGNALS,), for :func:`co_figures`.

    Costs a sample: steps + 5 forward and steps + 1 backward passes.

    Args:
        model: maps pixels to logits, in eval mode.
        x: pixels (B, C, H, W).
        y: labels int64 (B,).
        index: positions (B,): random numbers belong to the samples, so that each call asks the same.
        eps: radius of both attacks.
        norm: of the ball.
        step_size: of PGD.
        steps: of PGD.
    """
    fgsm = FGSM(eps, norm=norm).run(model, x, y, index=index)
    # Its first gradient is one at a random point of the ball, and its first logits are those of noise.
    pgd = PGD(eps, step_size, steps, norm=norm).run(model, x, y, index=index)
    delta = fgsm.x_adv - x
    half = len(x) // 2
    other, other_y = x.roll(half, 0), y.roll(half, 0)
    with torch.no_grad():

        def says(pixels: Tensor) -> Tensor:
            return model(pixels.clamp(0, 1).to(x.dtype)).argmax(1) == y

        right = {
            "clean": fgsm.first_logits.argmax(1) == y,
            "noise": pgd.first_logits.argmax(1) == y,
            "fgsm": says(fgsm.x_adv),
            "pgd": says(pgd.x_adv),
            "self_alone": says(_GREY + delta),
            "self_other": says(other + delta) & (other_y != y),
        }
    first, second = fgsm.first_gradient.flatten(1).float(), pgd.first_gradient.flatten(1).float()
    defined = (first != 0).any(1) & (second != 0).any(1)
    # Rescaled, since squares of small gradients underflow.
    cosine = F.cosine_similarity(*(g / g.abs().amax(1, keepdim=True).clamp_min(1e-38) for g in (first, second)))
    sums = {name: hit.sum() for name, hit in right.items()}
    sums["cosine"] = (cosine * defined).sum()
    sums["samples"] = torch.tensor(len(x), device=x.device)
    sums["others"], sums["gradients"] = (other_y != y).sum(), defined.sum()
    return torch.stack([sums[key].float() for key in _KEYS])


def co_figures(trainer: Trainer, sums: Tensor) -> dict[str, float]:
    """The signals over all processes, equal on each; without those that no sample defines.

    Returns:
        Accuracies ``clean``, ``noise`` (a random point of the ball), ``fgsm`` and ``pgd``; ``self_alone`` and ``self_other``,
        how often FGSM's perturbation is taken for the class that it was made for, on grey and on an image of another class;
        ``cosine`` between the gradients at the sample and at a random point of its ball; ``gap`` = fgsm - pgd; ``ratio`` =
        fgsm / clean. Nothing where there is no sample.
    """
    found = dict(zip(_KEYS, trainer.strategy.reduce(sums, reduce_op="sum").tolist(), strict=True))
    figures = {key: found[key] / found[per] for key, per in _SHARES.items() if found[per]}
    if not found["samples"]:
        return {}
    figures["gap"] = figures["fgsm"] - figures["pgd"]
    if figures["clean"]:
        figures["ratio"] = figures["fgsm"] / figures["clean"]
    return figures
