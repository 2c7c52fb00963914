"""A plain network from whatever holds one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from ..nets.weights import find_file, load_weights
from ..nets.zoo import pretrained
from ..trust import check_classes, guarded, read_checkpoint


def load_model(source: str | Path, net: nn.Module | None = None, *, named: Collection[str] = ()) -> nn.Module:
    """Load a trained network, on the CPU and in eval mode. ``torch.save(load_model(run).state_dict(), path)`` exports it.

    Args:
        source: the folder of a run (its ``best.ckpt``, else ``last.ckpt``), a checkpoint, a file with a state dict, or the
            name of a public network, such as RobustBench's ``Rice2020Overfitting`` or ``cifar10/L2/Rice2020Overfitting``, see
            :func:`robust_pl.nets.zoo.pretrained`.
        net: the network to fill; needed where the file does not say which it is, as a bare state dict does not.
        named: class paths outside of robust_pl, torch, timm and lightning that the checkpoint may import.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, carries code, names other classes, or does not fit the network.
    """
    path = Path(source)
    if path.is_dir():
        path = _checkpoint_of(path)
    elif not path.suffix and not path.exists():
        return pretrained(str(source))
    if net is None:
        path = find_file(path)
        checkpoint = read_checkpoint(path)
        config = checkpoint.get("hyper_parameters", {}).get("net")
        if not isinstance(config, dict):
            raise ValueError(f"{path} does not say which network it holds: pass it, load_model(path, net=ResNet18())")
        net = _build(config, path, named)
        load_weights(net, checkpoint["state_dict"])
    else:
        load_weights(net, path)
    return net.eval()


def _checkpoint_of(run: Path) -> Path:
    for name in ("best.ckpt", "last.ckpt"):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise FileNotFoundError(f"{run} holds no checkpoints/best.ckpt or last.ckpt: name the folder of a run that was fitted")


def _build(config: dict[str, Any], path: Path, named: Collection[str]) -> nn.Module:
    check_classes({"net": config}, path, named)
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    with guarded(named):
        return parser.instantiate_classes(parser.parse_object({"net": config})).net
