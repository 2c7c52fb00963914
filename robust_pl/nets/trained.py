"""The network of a finished run, with its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..trust import check_classes, guarded, read_checkpoint
from .reference import pick_average, places, resolve
from .robustbench import CLASSES
from .weights import SAFETENSORS, fill, load_weights
from .zoo import pretrained


def read_trained(source: str | Path, named: Collection[str] = ()) -> nn.Module:
    """The network that a run or a checkpoint holds, or a public one by its name; on the CPU, in eval mode.

    Args:
        source: see :class:`TrainedNet`.
        named: class paths outside of robust_pl, torch, timm and lightning that the checkpoint may import.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, carries code, names other classes, does not say which network it holds, or lacks the
            average.
    """
    if is_public(source):
        return pretrained(str(source))
    reference = resolve(source)
    # Files of this format hold tensors alone.
    checkpoint = {} if reference.path.suffix == SAFETENSORS else read_checkpoint(reference.path)
    config = checkpoint.get("hyper_parameters", {}).get("net")
    if not isinstance(config, dict):
        raise ValueError(
            f"{reference.path} does not say which network it holds: give the network, in a config as the argument net of "
            "TrainedNet, in code as load_model(path, net=ResNet18())"
        )
    tensors = checkpoint["state_dict"] if reference.average is None else pick_average(checkpoint, reference)
    net = _build(config, reference.path, named)
    fill(net, tensors, str(reference))
    return net.eval()


def is_public(source: str | Path) -> bool:
    """Whether this is the name of a public network: it has no suffix, no folder but a data set's, and nothing on disk is
    called so.
    """
    folder, inside, _ = str(source).partition("/")
    a_name = "#" not in str(source) and not Path(source).suffix and (not inside or folder in CLASSES)
    return a_name and not any(path.exists() for path in places(source))


def _build(config: Mapping[str, Any], path: Path, named: Collection[str]) -> nn.Module:
    check_classes({"net": config}, path, named)
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    with guarded(named):
        return parser.instantiate_classes(parser.parse_object({"net": config})).net


class TrainedNet(nn.Module):
    """A trained network as a class that a config can name: a teacher, a surrogate, where fine-tuning begins.

    ``{class_path: TrainedNet, init_args: {source: runs/teacher#ema}}``. It is built as the run's own config says. A file of
    nothing but weights says nothing, so the network is given beside it: ``{class_path: TrainedNet, init_args: {source:
    teacher.pt, net: {class_path: WideResNet, init_args: {num_classes: 10}}}}``, a :class:`TimmModel` say. It is in train mode,
    as timm's networks are; teachers and surrogates are put in eval mode by what holds them.

    Args:
        source: the folder of a run (its ``checkpoints/best.ckpt``, else ``last.ckpt``) or a checkpoint, as it is or under
            ``ROBUST_PL_DATA``; with ``#ema`` at its end that average instead of the raw weights. Or the name of a public
            network, see :func:`robust_pl.nets.zoo.pretrained`. With ``net`` a file or a run's folder, as
            :func:`load_weights` reads it.
        named: class paths outside of robust_pl, torch, timm and lightning that the checkpoint may import.
        net: the network that the weights are for, which then need not say it themselves; it is filled in place. Data are not
            linked to it: give it the ``num_classes`` that it was trained with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, carries code, names other classes, lacks the average, does not say which network it
            holds and ``net`` does not either, or does not fit ``net``.
    """

    def __init__(self, source: str, named: list[str] | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        if net is None:
            self.net = read_trained(source, named or ())
        else:
            load_weights(net, source)
            self.net = net
        # As any module that was just made: BatchNorm would else learn no statistics where fine-tuning begins from it. What
        # keeps a network as it is (Frozen) puts it in eval mode itself.
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) in [0, 1]."""
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before the last linear layer (B, D), where the network gives them."""
        return self.net.forward_features(x)
