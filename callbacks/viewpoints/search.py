"""One attack on chunks of objects: search, look at fresh views, keep what is finished, put everything together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...scenes.scene_set import SceneSet
from ...scenes.view_space import ViewSpace
from ..attacks.draws import seed_from
from ..store.files import sha256_of_tensors
from ..store.identity import sha256_of_weights
from .chunks import Chunks
from .distribution import TENSORS, UniformViews, ViewDistribution
from .found import Found
from .problem import WORST, ViewProblem

_SEEN = ("history", "u", "loss", "prediction", "center_prediction", *WORST)


class Searched(NamedTuple):
    """What a search found.

    Args:
        distribution: for each object.
        history: mean and largest fitness of the candidates of each iteration, (N, iterations, 2).
    """

    distribution: ViewDistribution | UniformViews
    history: Tensor


class Order(NamedTuple):
    """What a search is told beside the problem.

    Args:
        start: where to begin instead of at the attack's own start.
        iterations: how many instead of the attack's own.
        kept: what ``keep`` was last given, where a search was killed and goes on.
        keep: keeps tensors from which the search can go on; also told how far it is, in [0, 1].
    """

    start: ViewDistribution | None
    iterations: int | None
    kept: dict[str, Tensor] | None
    keep: Callable[[dict[str, Tensor], float], None]


class Searches(Protocol):
    """What is asked of an attack: see :meth:`robust_pl.callbacks.ViewpointAttack.search`."""

    def search(self, problem: ViewProblem, order: Order) -> Searched: ...


def attack_chunk(
    attack: Searches,
    problem: ViewProblem,
    chunks: Chunks,
    first: int,
    start: ViewDistribution | None,
    iterations: int | None,
    samples: int,
    sample_seed: int,
    tell: Callable[[float], None],
) -> dict[str, Any]:
    """Search for the objects of one chunk, and look at fresh views from what was found.

    Args:
        attack: that searches.
        problem: the objects.
        chunks: where it is kept; what is there already is not done again.
        first: number of the chunk's first object.
        start: where the search begins, or None.
        iterations: instead of the attack's own.
        samples: fresh views of each object.
        sample_seed: they are drawn with.
        tell: told which share is done.
    """
    if (kept := chunks.finished(first)) is not None:
        return {**kept[0], **kept[1]}
    state, meta = chunks.recall(first) or (None, {"seconds": 0.0})
    if state is not None:
        problem.load_state(state)
    began = problem.now() - meta["seconds"]

    def keep(tensors: dict[str, Tensor], share: float) -> None:
        if chunks.folder is not None:
            chunks.remember(first, {**tensors, **problem.state()}, {"seconds": problem.now() - began})
        tell(share)

    distribution, history = attack.search(problem, Order(start, iterations, state, keep))
    u = distribution.sample(samples, sample_seed)[0]
    seen = problem.look(u)
    centers = torch.zeros(len(u), 0, dtype=torch.int64)
    if isinstance(distribution, ViewDistribution) and samples:
        centers = problem.look(distribution.mean).prediction
    found = {"history": history, "u": u, "loss": seen.loss, "prediction": seen.prediction, "center_prediction": centers}
    found |= {**distribution.tensors(), **problem.state()}
    found = {key: value.cpu() for key, value in found.items()}
    renders = int(found.pop("renders"))
    for what in ("history", "loss"):
        if (bad := (~found[what].isfinite()).flatten(1).any(1)).any():
            name = problem.ids[int(bad.int().argmax())]
            raise ValueError(f"the network's loss on views of {name!r} is not finite: look at its weights, or use float32")
    meta = {"renders": renders, "seconds": problem.now() - began}
    chunks.finish(first, found, meta)
    return {**found, **meta}


def gathered(pieces: dict[int, dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The chunks of all processes, in order."""
    if world_size > 1:
        everyones: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyones, pieces)
        pieces = {first: piece for own in everyones for first, piece in own.items()}
    return [pieces[first] for first in sorted(pieces)]


def together(
    pieces: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    labels: Tensor,
    target: Tensor | None,
    space: ViewSpace,
    settings: dict[str, Any],
    sample_seed: int,
) -> Found:
    """What was found for all objects, of what was found for each chunk."""
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in (*_SEEN, *TENSORS) if name in pieces[0]}
    if "mean" in columns:
        weights, mean, sigma = (columns.pop(name) for name in TENSORS)
        mixture = "joint" if weights.dim() == 2 else "per_dim"
        distribution = ViewDistribution(weights, mean, sigma, space, ids, mixture, settings)
    else:
        distribution = UniformViews(space, ids)
    return Found(
        distribution=distribution,
        labels=labels,
        target=target,
        settings=settings,
        sample_seed=sample_seed,
        renders=sum(piece["renders"] for piece in pieces),
        seconds=sum(piece["seconds"] for piece in pieces),
        **columns,
    )


def facts_about(model: nn.Module, scenes: SceneSet, labels: Tensor, start: ViewDistribution | None) -> dict[str, Any]:
    """What tells one network, one set of objects and one start from another, for JSON."""
    background = scenes.background
    device = next((p.device for p in model.parameters()), torch.device("cpu")).type
    return {
        "weights": sha256_of_weights(model),
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "objects": [
            [name, label, renderer.fingerprint()]
            for name, label, renderer in zip(scenes.ids, labels.tolist(), scenes.renderers, strict=True)
        ],
        "background": sha256_of_tensors({"bank": background}) if isinstance(background, Tensor) else float(background),
        "start": None if start is None else sha256_of_tensors(start.tensors()),
    }


def sample_seed_of(seed: int) -> int:
    """With which the fresh views are drawn: others than any candidate of the search."""
    return seed_from(seed, "fresh views")
