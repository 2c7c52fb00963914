"""All checks for gradient masking on one network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...callbacks.attacks.checks import Number, check_eps, check_logits, check_shapes, choose
from ...callbacks.attacks.prepare import evaluating
from ...callbacks.gates import called_routed_nets
from ...functional.geometry import NORMS, Norm
from . import behaviour, gradients, routing, strength
from .binarization import Features
from .binarization import binarization as binarization_test
from .evidence import Evidence
from .flag import Flag


def masking_flags(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: Number | str = "8/255",
    norm: Norm = "linf",
    seed: int = 0,
    steps: int = 20,
    queries: int = 300,
    binarization: bool = True,
    features: Features | None = None,
    batch_size: int = 128,
) -> list[Flag]:
    """Look for signs that a network hides its gradients, so that attacks overstate its robustness.

    One flag a check, always all of them and in the same order; ``docs/masking_flags.md`` lists them. Behind them come four more
    for a model that calls a dynamic network, :class:`robust_pl.nets.RoutedNet`. A raised flag means
    that the accuracy under attack needs an adaptive attack to be believed. A check that the network makes fail raises its
    flag, too. Deterministic for a seed, unless the network draws random numbers that are not torch's.

    Cost with the defaults: for each sample that is classified correctly 183 forward and backward passes, and up to ``queries``
    forward passes if no gradient attack breaks it; for 32 of those 150 forward passes and 21 forward and backward passes
    more; and about 20 forward passes for every sample. A dynamic network costs 140 forward and backward passes more for each
    that is classified correctly.

    Args:
        model: maps pixels in [0, 1] (B, C, H, W) to logits (B, K); looked at in eval mode and left as it was.
        x: pixels (n, C, H, W) in [0, 1] on the network's device; 100 to 500 samples tell most.
        y: classes (n,).
        eps: radius that the robustness is claimed for, in units of the pixel range.
        norm: ``linf`` or ``l2``; PGD is too weak under l1 to tell a masked network from an honest one.
        seed: of all random numbers.
        steps: of PGD; the checks that need more take a multiple of it.
        queries: forward passes of the black-box search, for each sample that stands against gradients.
        binarization: whether to run the binarization test.
        features: for that test, maps pixels to features (B, D); None takes the input of the last linear layer.
        batch_size: samples that go through the network at once.

    Raises:
        ValueError: if eps is not above 0, the norm is l1, the labels are mixed, the shapes do not fit, or no sample is
            classified correctly.
    """
    check_shapes(x, y)
    if y.dim() != 1:
        raise ValueError(f"y has shape {tuple(y.shape)}: the audit needs classes (n,), as y.argmax(1) gives them")
    choose("norm", norm, NORMS)
    if norm == "l1":
        raise ValueError(
            "norm='l1' cannot be audited: PGD is so weak under l1 that honest networks look masked; choose linf or l2"
        )
    eps = check_eps(eps, norm)
    if eps <= 0:
        raise ValueError(f"eps={eps} leaves nothing to attack: pass the radius that robustness is claimed for, such as 8/255")
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.random.fork_rng(range(torch.cuda.device_count()) if x.is_cuda else []),
    ):
        torch.manual_seed(seed)
        x, y = x.detach().clone(), y.clone()
        with torch.no_grad():
            check_logits(model(x[:batch_size]), y[:batch_size], values=False)
        checks = _checks(queries, binarization, features)
        checks += routing.CHECKS if called_routed_nets(model, x) else []
        evidence = Evidence(model, x, y, eps=eps, norm=norm, seed=seed, batch_size=batch_size, steps=steps)
        if not len(evidence.right):
            raise ValueError(f"the network classifies none of {len(x)} samples correctly: check labels and normalisation")
        return [_checked(check, evidence) for check in checks]


def _checks(queries: int, binarization: bool, features: Features | None) -> list[Callable[[Evidence], Flag]]:
    """All checks, in the order of the report."""
    checks: list[Callable[[Evidence], Flag]] = [
        behaviour.randomized,
        behaviour.softmax_output,
        behaviour.batch_dependent,
        behaviour.train_mode,
        behaviour.runtime_optimisation,
        gradients.zero_gradient,
        gradients.gradient_mismatch,
        gradients.piecewise_constant,
        strength.single_step_beats_iterative,
        strength.more_steps_not_stronger,
        strength.larger_eps_not_stronger,
        strength.unbounded_attack_fails,
        partial(strength.black_box_beats_white_box, queries=queries),
    ]
    if binarization:
        checks.append(partial(binarization_test, features=features))
    return checks


def _checked(check: Callable[[Evidence], Flag], evidence: Evidence) -> Flag:
    """What the check finds; a network that makes it fail is flagged, since it would make an attack fail as well."""
    torch.manual_seed(evidence.seed)
    try:
        return check(evidence)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        name = check.func.__name__ if isinstance(check, partial) else check.__name__
        return Flag(name, True, None, None, f"the check failed on this network: {str(error).splitlines()[0]}")
