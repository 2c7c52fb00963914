"""Public trained networks, by name, for examples and checks; the files themselves are not part of the package."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .resnet2b import ResNet2B
from .resnet_cifar import ResNet20
from .weights import load_weights


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
    """Return a public CIFAR-10 network with its weights and normalisation, in eval mode, on the CPU.

    ``akamaster_resnet20`` (https://github.com/akamaster/pytorch_resnet_cifar10): ResNet-20, standard training, clean
    91.73 %. ``abcrown_resnet2b_adv2`` (https://github.com/Verified-Intelligence/alpha-beta-CROWN): ResNet-2B,
    adversarially trained for Linf 2/255, clean 69.24 %. Both accuracies are on all 10,000 test images.

    Args:
        name: one of the two names above.

    Raises:
        ValueError: if there is no such name.
        FileNotFoundError: if ``checkpoints/`` in the folder ``ROBUST_PL_DATA`` lacks the file.
    """
    if name not in _ZOO:
        near = difflib.get_close_matches(name, _ZOO, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_ZOO)}"
        raise ValueError(f"no pretrained network is called {name!r}: {hint}")
    entry = _ZOO[name]
    data = os.environ.get("ROBUST_PL_DATA")
    path = Path(data or ".").expanduser() / "checkpoints" / entry.file
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights of {name} at {path}: ROBUST_PL_DATA must point at the data folder "
            f"that holds checkpoints/ ({f'it is {data}' if data else 'it is not set'})"
        )
    net = entry.build(num_classes=10, mean=entry.mean, std=entry.std)
    load_weights(net, path)
    return net.eval()
