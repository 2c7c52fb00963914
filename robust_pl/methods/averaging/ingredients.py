"""What soups are made of: weights on disk, all of one network, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...nets.averages import tensors_of
from ...nets.reference import split
from ...nets.trajectory import FOLDER, Trajectory, read_trajectory

Ingredients = str | list[str]


def read_ingredients(ingredients: Ingredients, net: nn.Module, skip: int = 0) -> Trajectory:
    """Weights under the names of ``net``, read only when they are asked for.

    Args:
        ingredients: a folder: of a run with a trajectory, of checkpoints, or of several runs (``best.ckpt`` of each, else
            ``last.ckpt``); or a list of references, each ``PATH`` or ``PATH#ema``.
        net: the network.
        skip: leave out so many of the first, such as a trajectory's beginning.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if skip is negative, fewer than two are left, or one is of another network.
    """
    if skip < 0:
        raise ValueError(f"skip={skip} must be at least 0")
    source: Ingredients = ingredients
    if isinstance(ingredients, str):
        path, average = split(ingredients)
        folder = Path(path).expanduser()
        runs = sorted(p.parent for p in folder.glob("*/checkpoints")) if folder.is_dir() else []
        if runs and not (folder / FOLDER).is_dir() and not (folder / "checkpoints").is_dir():
            source = [f"{run}#{average}" if average else str(run) for run in runs]
    found = read_trajectory(source)
    if len(found) - skip < 2:
        left = f" and skip={skip} leaves {max(len(found) - skip, 0)}" if skip else ""
        raise ValueError(f"ingredients={ingredients!r} name {len(found)} network(s){left}: a soup needs at least two")
    return found[skip:].of(net)


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, without gradients: what a soup combines."""
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def mean_of(samples: Trajectory, net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Equal average of parameters and of running statistics, one tensor after the other; counters are the first one's."""
    for name in tensors_of(net):
        if all(name in sample for sample in samples):
            first = samples[0][name]
            yield name, samples.mean(name) if first.is_floating_point() else first


@torch.no_grad()
def write(net: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named tensors into ``net``, in place, one after the other."""
    own = tensors_of(net)
    for name, tensor in tensors:
        own[name].copy_(tensor)
