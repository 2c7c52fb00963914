"""Averaged weights that take the place of a module's own for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .reference import AVERAGES_KEY


@dataclass(frozen=True)
class Average:
    """Averaged weights beside raw ones.

    Args:
        name: ``ema``, say.
        weights: name in the module's state dict -> averaged tensor; what is not in it is that of the raw module.
    """

    name: str
    weights: Mapping[str, Tensor]

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the averages into ``module``; afterwards the raw weights are back, bit for bit.

        Copied in place, since optimizers, DistributedDataParallel and compiled graphs hold the tensors themselves. Not
        while a graph through them waits for its backward pass.

        Raises:
            ValueError: if they are those of another network.
        """
        own = tensors_of(module)
        for name, tensor in self.weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(
                    f"the average {self.name!r} holds {name} {tuple(tensor.shape)}, which the network lacks: it is that of "
                    "another network than the config's"
                )
        places = [own[name] for name in self.weights]
        raw = [place.clone() for place in places]
        try:
            _copy(places, list(self.weights.values()))
            yield
        finally:
            _copy(places, raw)


def averages_in(checkpoint: Mapping[str, Any]) -> list[Average]:
    """The averages of a checkpoint that have begun.

    Raises:
        ValueError: if what is there are none.
    """
    found = []
    for name, average in checkpoint.get(AVERAGES_KEY, {}).items():
        weights = average.get("weights") if isinstance(average, Mapping) else None
        if not str(name).replace("_", "").isalnum() or not isinstance(weights, Mapping):
            raise ValueError(f"the checkpoint's average {name!r} is none that this library writes: use another checkpoint")
        if weights:
            found.append(Average(name, weights))
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the state dict, without gradients; tied ones under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _copy(places: list[Tensor], values: list[Tensor]) -> None:
    # An evaluation runs in inference mode, in which clones would be tensors that nothing else may write to.
    with torch.inference_mode(False), torch.no_grad():
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
