"""A plain network from whatever holds one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ..nets.reference import split
from ..nets.trained import is_public, read_trained
from ..nets.weights import load_weights
from ..nets.zoo import pretrained


def load_model(
    source: str | Path, net: nn.Module | None = None, *, weights: str | None = None, named: Collection[str] = ()
) -> nn.Module:
    """Load a trained network, on the CPU and in eval mode. ``torch.save(load_model(run).state_dict(), path)`` exports it.

    Args:
        source: the folder of a run (its ``best.ckpt``, else ``last.ckpt``), a checkpoint, a file with a state dict, or the
            name of a public network, such as RobustBench's ``Rice2020Overfitting`` or ``cifar10/L2/Rice2020Overfitting``, see
            :func:`robust_pl.nets.zoo.pretrained`. With ``#ema`` at its end it is the average of that name in the checkpoint.
        net: the network to fill; needed where the file does not say which it is, as a bare state dict does not.
        weights: name of the average, such as ``ema``, instead of ``#ema``; None takes the raw weights.
        named: class paths outside of robust_pl, torch, timm and lightning that the checkpoint may import.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, carries code, names other classes, lacks the average, or does not fit the network.
    """
    if weights is not None:
        if split(source)[1] not in (None, weights):
            raise ValueError(f"source={source} and weights={weights!r} name two averages: give one of them")
        source = f"{split(source)[0]}#{weights}"
    if is_public(source):
        return pretrained(str(source))
    if net is None:
        return read_trained(source, named)
    load_weights(net, source)
    return net.eval()
