"""State that processes share: started by test_fgsm_uap with torchrun, one line of JSON with what differs between them."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_pl.callbacks import FGSM
from robust_pl.data import DigitsDataModule
from robust_pl.methods import FGSMCUAP, FGSMFUAP, FGSMUAP, LIET, Method
from robust_pl.nets import SmallCNN

from .test_composition import trainer_for
from .test_methods import sgd

EPS = 0.1


@dataclass(frozen=True)
class Shared:
    """A method.

    Args:
        build: makes it.
        alike: whether it takes the same steps on one process; those that draw noise of each sample do not.
    """

    build: Callable[[], Method]
    alike: bool = False


def flat() -> nn.Module:
    """No BatchNorm, whose statistics are those of each process."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


METHODS: dict[str, Shared] = {
    "FGSMUAP": Shared(lambda: FGSMUAP(flat(), FGSM(EPS, bn_mode="train"), uap_eps=0.125, lmbda=1.0, optimizer=sgd), True),
    "FGSMCUAP": Shared(lambda: FGSMCUAP(flat(), FGSM(EPS, bn_mode="train"), uap_eps=0.125, lmbda=1.0, optimizer=sgd), True),
    "FGSMFUAP": Shared(lambda: FGSMFUAP(flat(), FGSM(EPS, bn_mode="train"), clusters=4, uap_eps=0.125, optimizer=sgd)),
    "FGSMFUAP, BatchNorm": Shared(
        lambda: FGSMFUAP(SmallCNN(width=4), FGSM(EPS, bn_mode="train"), clusters=4, uap_eps=0.125, optimizer=sgd)
    ),
    "LIET": Shared(lambda: LIET(SmallCNN(width=4), FGSM(EPS, bn_mode="train"), update_every=2, optimizer=sgd)),
}


def state(name: str, root: Path, batch_size: int = 16, **more: Any) -> dict[str, Tensor]:
    """Everything that a run of three steps leaves, in float64."""
    torch.manual_seed(0)
    method = METHODS[name].build()
    settings = {"max_epochs": 1, "limit_train_batches": 3, "precision": "64-true", "default_root_dir": root, **more}
    trainer_for([], **settings).fit(method, DigitsDataModule(batch_size=batch_size))
    return {key: tensor.clone() for key, tensor in method.state_dict().items()}


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    root = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in METHODS:
        found = state(name, root, batch_size=8, strategy="ddp", devices=2)
        differing = []
        for key, tensor in found.items():
            first = tensor.clone()
            dist.broadcast(first, 0)
            if not torch.equal(first, tensor) and "running" not in key:
                differing.append(key)
        everywhere: list[list[str]] = [[], []]
        dist.all_gather_object(everywhere, differing)
        if dist.get_rank() == 0:
            torch.save(found, root / f"{name}.pt")
            print("RESULT " + json.dumps({"name": name, "differing": [*everywhere[0], *everywhere[1]]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
