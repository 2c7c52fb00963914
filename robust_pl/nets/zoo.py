"""Public trained networks, by name, for examples, checks and comparison; the files themselves are not part of the package."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from . import robustbench
from .resnet2b import ResNet2B
from .resnet_cifar import ResNet20
from .weights import fill, load_weights, read_tensors, rename


class _Entry(NamedTuple):
    build: Callable[..., nn.Module]
    file: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_ZOO = {
    "akamaster_resnet20": _Entry(ResNet20, "akamaster_resnet20.th", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "abcrown_resnet2b_adv2": _Entry(
        ResNet2B, "abcrown_resnet2b_adv2.pth", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
}


def pretrained(name: str) -> nn.Module:
    """Return a public network with its weights and normalisation, in eval mode, on the CPU. Nothing is downloaded.

    Names of RobustBench (https://robustbench.github.io), for CIFAR-10 under Linf and L2 and for CIFAR-100 under Linf:
    ``Rice2020Overfitting``, or with data set and threat model ``cifar10/L2/Rice2020Overfitting``; without them CIFAR-10 and
    Linf are meant. Their files lie where RobustBench puts them, ``models/<data set>/<threat model>/<name>.pt``, in the
    folder ``ROBUST_PL_DATA`` or the working directory.

    ``akamaster_resnet20`` (https://github.com/akamaster/pytorch_resnet_cifar10): ResNet-20, standard training, clean
    91.73 %. ``abcrown_resnet2b_adv2`` (https://github.com/Verified-Intelligence/alpha-beta-CROWN): ResNet-2B,
    adversarially trained for Linf 2/255, clean 69.24 %. Both accuracies are on all 10,000 test images of CIFAR-10;
    the files lie in ``checkpoints/`` of either folder.

    Args:
        name: one of the names above.

    Raises:
        ValueError: if there is no such name, the network is none that robust_pl builds, or the file does not fit it.
        FileNotFoundError: if the file is in none of these places.
    """
    if name in _ZOO:
        entry = _ZOO[name]
        net = entry.build(num_classes=10, mean=entry.mean, std=entry.std)
        load_weights(net, _find(name, f"checkpoints/{entry.file}"))
        return net.eval()
    found = robustbench.find(name)
    if found is None:
        raise ValueError(f"no pretrained network is called {name!r}: {_hint(name)}")
    full, recipe = found
    path = _find(name, f"models/{full}.pt")
    net = recipe.build(robustbench.CLASSES[full.partition("/")[0]])
    fill(net, rename(read_tensors(path, recipe.part), robustbench.RENAMED), str(path))
    return net.eval()


def _hint(name: str) -> str:
    known = [*_ZOO, *robustbench.MODELS[robustbench.DEFAULT]]
    known += [f"{table}/{bare}" for table, models in robustbench.MODELS.items() for bare in models]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(_ZOO)}, and RobustBench's, such as 'Standard' or 'cifar10/L2/Rice2020Overfitting'"


def _find(name: str, file: str) -> Path:
    data = os.environ.get("ROBUST_PL_DATA")
    folders = [Path(data).expanduser()] if data else []
    paths = [folder / file for folder in (*folders, Path())]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no weights of {name} at {' or '.join(map(str, paths))}: ROBUST_PL_DATA must point at the data folder "
        f"that holds {file.partition('/')[0]}/ ({f'it is {data}' if data else 'it is not set'}); nothing is downloaded"
    )
