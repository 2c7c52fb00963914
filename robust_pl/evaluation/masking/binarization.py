"""The binarization test: does an attack find adversarial examples that are known to exist?"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ...callbacks.attacks.draws import Draws
from ...callbacks.attacks.pgd import PGD
from ...functional import geometry
from .evidence import Evidence
from .flag import Flag
from .subject import Subject

Features = Callable[[Tensor], Tensor]
NAME = "binarization"
_SAMPLES, _PASS, _CHANCE = 32, 0.95, 0.5
_INNER, _BOUNDARY, _FRESH = 49, 10, 20
_GAP, _OCCUPANCY = 0.05, 0.8


def binarization(evidence: Evidence, features: Features | None = None) -> Flag:
    """Success of PGD where an adversarial example certainly exists (Zimmermann et al. 2022, arXiv 2206.13991).

    For each of 32 correctly classified samples, a logistic regression on the features of the network tells 49 points well
    inside the ball, x among them, from 10 on its surface. PGD, which starts at x, must then reach the side of the surface.
    Features of too few dimensions for 59 points get fewer, in the same ratio. Samples whose points no plane separates are
    discarded and counted. As in the paper 95 % must be found, here less two standard errors;
    that says something only if random points seldom do.
    Cost per sample: 80 forward passes, and a forward and a backward pass for each step.

    Args:
        evidence: what to test.
        features: maps pixels (B, C, H, W) to what a readout sees (B, D); None takes the input of the last linear layer.
    """
    x, _, rows = evidence.some(_SAMPLES)
    features = features or last_linear_input(evidence.net, x[: evidence.batch_size].to(evidence.dtype))
    if features is None:
        return Flag(NAME, False, None, None, "no last linear layer was found: pass features=, which maps pixels to (B, D)")
    flat = _flattened(features, evidence.dtype)
    subject = Subject(flat, evidence.batch_size)
    readouts, separable = _readouts(evidence, subject, x, rows)
    discarded = f"{len(x) - int(separable.sum())} of {len(x)} samples discarded, whose points no plane separates"
    if not separable.any():
        return Flag(NAME, False, None, None, f"{discarded}: pass wider features=")

    x, rows, readouts = x[separable], rows[separable], readouts[separable]
    found = []
    for part, index, readout in zip(*(t.split(evidence.batch_size) for t in (x, rows, readouts)), strict=True):
        binary = Subject(lambda pixels, readout=readout: _logits(flat(pixels), readout), evidence.batch_size)
        attack = PGD(evidence.eps, steps=evidence.steps, norm=evidence.norm, random_start=False, seed=evidence.seed)
        x_adv = attack.run(binary, part, torch.zeros_like(index), index=index, careful=False).x_adv
        found.append(binary.predict(x_adv).argmax(1))
    value = torch.cat(found).float().mean().item()
    draws = evidence.draws("binarization, by chance", rows)
    fresh = [_logits(subject.predict(_point(draws, x, evidence, 1.0)), readouts).argmax(1) for _ in range(_FRESH)]
    chance = torch.stack(fresh).float().mean().item()
    # Two standard errors below, since the share of a few dozen is itself uncertain: 87.3 % of 32.
    threshold = _PASS - 2 * (_PASS * (1 - _PASS) / len(x)) ** 0.5
    return Flag(
        NAME,
        value < threshold and chance < _CHANCE,
        value,
        threshold,
        f"PGD-{evidence.steps} finds {value:.1%} of adversarial examples that exist, random points {chance:.1%} "
        + ("" if chance < _CHANCE else "(too many for the test to say anything) ")
        + f"({discarded})",
    )


def last_linear_input(net: nn.Module, x: Tensor) -> Features | None:
    """The map from pixels to the input of the linear layer that runs last; None if there is no such layer."""
    ran: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in net.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        return None
    head = ran[-1]

    def features(pixels: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            net(pixels)
        finally:
            hook.remove()
        return seen[-1]

    return features


def _flattened(features: Features, dtype: torch.dtype) -> Features:
    return lambda pixels: features(pixels.to(dtype)).flatten(1).to(pixels.dtype)


def _readouts(evidence: Evidence, subject: Subject, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a readout for each sample, (n, D + 1), and whether it separates its points, bool (n,)."""
    draws = evidence.draws(NAME, rows)
    seen = [subject.predict(x)]
    points = min(_INNER + _BOUNDARY, max(3, int(_OCCUPANCY * seen[0].shape[1])))
    boundary = max(1, round(points * _BOUNDARY / (_INNER + _BOUNDARY)))
    inner = points - boundary
    seen += [subject.predict(_point(draws, x, evidence, 1 - _GAP, inside=True)) for _ in range(inner - 1)]
    seen += [subject.predict(_point(draws, x, evidence, 1.0)) for _ in range(boundary)]
    on_surface = torch.arange(points) >= inner
    fits = [_fit(of_sample, on_surface) for of_sample in torch.stack(seen, 1).double().cpu()]
    readouts = torch.stack([readout for readout, _ in fits])
    return readouts.to(x), torch.tensor([separable for _, separable in fits], device=x.device)


def _fit(features: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
    """Logistic regression on (N, D), scaled to logits of at most one; and whether it is right everywhere."""
    if not features.isfinite().all():
        return features.new_zeros(features.shape[1] + 1), False
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 0, std, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Hardly any penalty: the points need be separated, whatever the weights.
        fit = LogisticRegression(C=1e6, max_iter=1000).fit(((features - mean) / std).numpy(), labels.numpy())
    weight = torch.from_numpy(fit.coef_[0]) / std
    bias = float(fit.intercept_[0]) - weight @ mean
    logits = features @ weight + bias
    readout = torch.cat([weight, bias.view(1)]) / logits.abs().max().clamp_min(1e-12)
    return readout, bool(((logits > 0) == labels).all())


def _logits(features: Tensor, readouts: Tensor) -> Tensor:
    """Two logits a sample from its own readout: features (n, D), readouts (n, D + 1) -> (n, 2)."""
    logit = torch.einsum("nd,nd->n", features, readouts[:, :-1]) + readouts[:, -1]
    return torch.stack([torch.zeros_like(logit), logit], 1)


def _point(draws: Draws, x: Tensor, evidence: Evidence, share: float, inside: bool = False) -> Tensor:
    """A random point a sample on the surface of the ball of ``share`` times eps, or anywhere in it, in the box."""
    z = 2 * draws.uniform(x) - 1 if evidence.norm == "linf" else draws.normal(x)
    radius = share * evidence.eps * torch.ones_like(x[:, :1, :1, :1])
    if inside:
        radius = radius * draws.uniform(radius) ** (1 / x[0].numel())
    return (x + z * radius / geometry.size(z, evidence.norm).view(-1, 1, 1, 1)).clamp(0, 1)
