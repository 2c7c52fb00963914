"""Checks of dynamic networks: do gates that follow the image hide gradients, or know who attacks?

Such defences are easily overestimated, since an attack must fool the network and its router together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.problem import Objective
from ...callbacks.gates import called_routed_nets, gate_problems
from ...functional.losses import cross_entropy
from .evidence import Evidence
from .flag import Flag
from .routes import Routes
from .strength import _not_stronger
from .subject import Subject

_SAME = 1e-4
_LEAST = 1e-3


def detached_gates(evidence: Evidence) -> Flag:
    """Whether gradients by the pixels reach the router, its signals, and what these do; an evaluation refuses such networks.

    On 8 images, some 20 forward and 20 backward passes, most of them of the router alone.
    """
    problems = gate_problems(evidence.net, evidence.x[: evidence.batch_size].to(evidence.dtype))
    return Flag(
        "detached_gates",
        bool(problems),
        float(len(problems)),
        0.0,
        "; ".join(problems) or "gradients go through router and gates",
    )


def router_evasion(evidence: Evidence) -> Flag:
    """Accuracy under PGD on cross-entropy minus that under PGD that also aims at the router.

    Three attacks of as many kinds: on cross-entropy plus the distance of the signals from those of the clean image, which
    misleads the router; on cross-entropy minus it, which keeps the router calm; and on the distance alone. Plain PGD has as
    many tries from the same random starts. A signal counts in units of its standard deviation over clean images, and a mean
    square of 1 as much as 1 nat. 6 times the steps forward and backward.
    """
    routes = _routes(evidence)
    clean = torch.cat([_columns(routes.signals(part)) for part in _parts(evidence)])
    scale = clean.float().std(0).clamp_min(_LEAST)

    def distance(signals: Tensor, reference: Tensor) -> Tensor:
        return ((signals - reference) / scale).square().mean(1)

    kinds: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda logits, y, away: cross_entropy(logits, y) + away,
        lambda logits, y, away: cross_entropy(logits, y) - away,
        lambda logits, y, away: away,
    ]
    classes = evidence.clean.shape[1]
    joint = Subject(lambda x: _joined(*routes.said(x)), evidence.batch_size, evidence.dtype)
    plain, evading = _nobody(evidence), _nobody(evidence)
    for kind, of_kind in enumerate(kinds):

        def objective(outputs: Tensor, y: Tensor, reference: Tensor, of_kind: Callable[..., Tensor] = of_kind) -> Tensor:
            return of_kind(outputs[:, :classes], y, distance(outputs[:, classes:], reference))

        attack = PGD(evidence.eps, steps=evidence.steps, norm=evidence.norm, seed=evidence.seed + kind)
        for rows in evidence.right.split(evidence.batch_size):
            x, y = evidence.x[rows], evidence.y[rows]
            for fell, subject, aim in (
                (plain, evidence.subject, Objective(cross_entropy, (y,))),
                (evading, joint, Objective(objective, (y, clean[rows].float()))),
            ):
                attacked = attack.run(subject, x, y, objective=aim, index=rows, careful=False)
                fell[rows] |= evidence.predict(attacked.x_adv).argmax(1) != y
    right = _stands(evidence)
    return _not_stronger(
        "router_evasion",
        ("PGD that also aims at the router", right & ~evading),
        ("PGD on cross-entropy alone", right & ~plain),
    )


def frozen_gates(evidence: Evidence) -> Flag:
    """Accuracy under PGD minus that under PGD whose gates stay those of the clean image, both judged on the whole network.

    The gradient through the gates must be worth more than the one without it. ``steps`` forward and backward passes.
    """
    routes, stands = _routes(evidence), _nobody(evidence)
    attack = PGD(evidence.eps, steps=evidence.steps, norm=evidence.norm, random_start=False, seed=evidence.seed)
    for rows in evidence.right.split(evidence.batch_size):
        x, y = evidence.x[rows], evidence.y[rows]
        held = routes.held(routes.signals(x.to(evidence.dtype)))
        attacked = attack.run(Subject(held, evidence.batch_size, evidence.dtype), x, y, index=rows, careful=False)
        stands[rows] = evidence.predict(attacked.x_adv).argmax(1) == y
    return _not_stronger(
        "frozen_gates", ("PGD with the gates of the clean image", stands), (f"PGD-{evidence.steps}", evidence.pgd())
    )


def mixed_batch(evidence: Evidence) -> Flag:
    """Whether logits change where clean and attacked images share a batch, as where a BatchNorm is chosen for all of it.

    Four forward passes of one batch, half of it clean, against batches of one kind, all of equal size; and PGD on that batch.
    """
    rows = evidence.right[: evidence.batch_size]
    x, y = evidence.x[rows], evidence.y[rows]
    attack = PGD(evidence.eps, steps=evidence.steps, norm=evidence.norm, random_start=False, seed=evidence.seed)
    x_adv = attack.run(evidence.subject, x, y, index=rows, careful=False).x_adv
    first = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1) < (len(x) + 1) // 2
    clean, adversarial, one, other = (
        _directions(evidence, images) for images in (x, x_adv, torch.where(first, x, x_adv), torch.where(first, x_adv, x))
    )
    half = first.flatten(1)
    distances = (torch.where(half, clean, adversarial) - one, torch.where(half, adversarial, clean) - other)
    value = max(d.norm(dim=1).max().item() for d in distances)
    return Flag(
        "mixed_batch",
        value > _SAME,
        value,
        _SAME,
        f"clean and attacked images in one batch move each other's logits by up to {value:.2g} of their length",
    )


CHECKS: list[Callable[[Evidence], Flag]] = [detached_gates, router_evasion, frozen_gates, mixed_batch]


def _routes(evidence: Evidence) -> Routes:
    return Routes(evidence.net, called_routed_nets(evidence.net, evidence.x.to(evidence.dtype)))


def _parts(evidence: Evidence) -> list[Tensor]:
    return [part.to(evidence.dtype) for part in evidence.x.split(evidence.batch_size)]


def _columns(signals: list[Tensor]) -> Tensor:
    return torch.cat(signals, 1)


def _joined(logits: Tensor, signals: list[Tensor]) -> Tensor:
    columns = _columns(signals)
    return torch.cat([logits.to(torch.promote_types(logits.dtype, columns.dtype)), columns], 1)


def _nobody(evidence: Evidence) -> Tensor:
    return torch.zeros(evidence.samples, dtype=torch.bool, device=evidence.x.device)


def _stands(evidence: Evidence) -> Tensor:
    stands = _nobody(evidence)
    stands[evidence.right] = True
    return stands


def _directions(evidence: Evidence, x: Tensor) -> Tensor:
    torch.manual_seed(evidence.seed)
    return F.normalize(evidence.predict(x).nan_to_num(), dim=1)
