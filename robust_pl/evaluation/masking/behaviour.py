"""Checks of what a network does when it is called: no attack is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...callbacks.attacks.checks import looks_like_softmax
from .evidence import Evidence
from .flag import Flag

_REPEATS = 5
_SAME = 1e-4


def randomized(evidence: Evidence) -> Flag:
    """Whether equal calls give different logits, the rule of AutoAttack (Croce and Hein 2020, arXiv 2003.01690).

    Five forward passes of one batch: the largest distance between two of them, of logits scaled to length one.
    """
    x = evidence.x[: evidence.batch_size]
    runs = torch.stack([_directions(evidence.predict(x)) for _ in range(_REPEATS)])
    distance = (runs.unsqueeze(0) - runs.unsqueeze(1)).norm(dim=-1).max().item()
    raised = distance > _SAME
    return Flag(
        "randomized",
        raised,
        distance,
        _SAME,
        f"logits of {_REPEATS} equal calls differ by up to {distance:.2g} of their length"
        + (": attack the expectation (EOT)" if raised else ""),
    )


def softmax_output(evidence: Evidence) -> Flag:
    """Whether the network returns probabilities, whose gradients vanish where it is sure. No pass of its own."""
    away = (evidence.clean.sum(1) - 1).abs().max().item()
    raised = looks_like_softmax(evidence.clean)
    return Flag(
        "softmax_output",
        raised,
        away,
        _SAME,
        "every output is a probability vector: return logits instead" if raised else "the outputs are no probabilities",
    )


def batch_dependent(evidence: Evidence) -> Flag:
    """Whether the logits of a sample depend on what else is in its batch, as BatchNorm's do in train mode.

    Two forward passes of batches of equal size, whose first halves are the same: with another size an honest network may
    run other kernels, which round differently. Both see the same random numbers.
    """
    x = evidence.x[: evidence.batch_size]
    half = (len(x) + 1) // 2
    runs = []
    for mates in (x[half:], 1 - x[half:].flip(0)):
        torch.manual_seed(evidence.seed)
        runs.append(_directions(evidence.predict(torch.cat([x[:half], mates]))[:half]))
    distance = (runs[0] - runs[1]).norm(dim=-1).max().item()
    raised = distance > _SAME
    return Flag(
        "batch_dependent",
        raised,
        distance,
        _SAME,
        f"other samples in the batch move the logits of a sample by up to {distance:.2g} of their length",
    )


def train_mode(evidence: Evidence) -> Flag:
    """Whether a submodule stays in training mode after ``model.eval()``. No pass."""
    training = [name or "the network" for name, module in evidence.net.named_modules() if module.training]
    return Flag(
        "train_mode",
        bool(training),
        float(len(training)),
        0.0,
        f"in training mode after eval(): {', '.join(training[:3])}{', ...' if len(training) > 3 else ''}"
        if training
        else "every submodule is in eval mode",
    )


def runtime_optimisation(evidence: Evidence) -> Flag:
    """Whether a forward pass calls autograd, as defences do that optimise at inference (AutoAttack's dynamic defences).

    One forward pass of one batch. It sees calls of this process in Python, through whatever name.
    """
    with _engine_watched() as calls:
        evidence.predict(evidence.x[: evidence.batch_size])
    return Flag(
        "runtime_optimisation",
        bool(calls),
        float(len(calls)),
        0.0,
        f"autograd was called {len(calls)} times during one forward pass"
        + (": the defence optimises at inference, attack it adaptively" if calls else ""),
    )


def _directions(logits: Tensor) -> Tensor:
    return torch.nn.functional.normalize(logits.nan_to_num(), dim=1)


@contextmanager
def _engine_watched() -> Iterator[list[None]]:
    # autograd.grad, autograd.backward, Tensor.backward and torch.func all end here, also where they were imported by name.
    calls: list[None] = []
    engine = torch.autograd._engine_run_backward

    def watched(*args: object, **kwargs: object) -> object:
        calls.append(None)
        return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = watched
    try:
        yield calls
    finally:
        torch.autograd._engine_run_backward = engine
