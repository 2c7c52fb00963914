"""One process of a side of ``benchmarks.scale``: it trains, evaluates and reduces, each time when it is told."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.optim import SGD

from robust_pl import nets
from robust_pl.callbacks import PGD, RobustEvaluation
from robust_pl.data import DigitsDataModule
from robust_pl.methods import PGDAT

WEIGHTS = "weights.pt"
DONE = "@done "


@dataclass(frozen=True)
class Setting:
    """What all sides share.

    Args:
        net: name of a network.
        batch: images a training step, of all processes together.
        chunk: images an evaluation chunk.
        images: to evaluate.
        steps: of the attack.
        rounds: beside the warm-up.
    """

    net: str
    batch: int
    chunk: int
    images: int
    steps: int
    rounds: int


def work(setting: Setting, threads: int, folder: Path) -> None:
    """Train, evaluate and reduce, each time when it is told."""
    torch.set_num_threads(threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    world = int(os.environ["WORLD_SIZE"])
    seed_everything(0, verbose=False)
    net = getattr(nets, setting.net)(in_channels=1)
    begun = torch.load(folder.parent / WEIGHTS, weights_only=True)
    net.load_state_dict(begun)
    method = PGDAT(net, PGD(8 / 255, 2 / 255, setting.steps), optimizer=lambda params: SGD(params, 0.01, momentum=0.9))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    world_of = {"accelerator": "cpu", "devices": world, "strategy": "ddp" if world > 1 else "auto"}
    share = setting.batch // world
    y = torch.arange(share) % 10
    x = torch.rand(share, 1, 32, 32, generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    trainer = Trainer(max_epochs=1, callbacks=[Answer()], use_distributed_sampler=False, **quiet, **world_of)
    answer({"parameters": sum(p.numel() for p in net.parameters())})
    trainer.fit(method, OnDemand([(x, y), (x[::2], y[::2])], setting.rounds + 1))
    net.load_state_dict(begun)  # training rounds differently on each side
    for turn in range(setting.rounds + 1):
        listen()
        attack = PGD(8 / 255, 2 / 255, setting.steps, random_start=True)
        evaluation = RobustEvaluation(output_dir=str(folder / str(turn)))
        trainer = Trainer(callbacks=[attack, evaluation], **quiet, **world_of)
        with open(os.devnull, "w") as nowhere:
            sys.stdout, out = nowhere, sys.stdout
            trainer.test(method, Digits32(setting.images, setting.chunk), verbose=False)
            sys.stdout = out
        answer({})
    size = sum(p.numel() for p in net.parameters())
    for _ in range(setting.rounds + 1):
        listen()
        if world > 1:
            torch.distributed.all_reduce(torch.ones(size))
        answer({})


def listen() -> None:
    """Wait for a turn."""
    if not sys.stdin.readline():
        sys.exit()


def answer(what: dict[str, Any]) -> None:
    """Say that it is over."""
    print(DONE + json.dumps(what), flush=True)


class Answer(Callback):
    """Ends each training step with a word."""

    def on_train_batch_end(self, *_: Any) -> None:
        answer({})


class OnDemand:
    """Each batch so many times, each time when it is this side's turn."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count * len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            for _ in range(self.count):
                listen()
                yield batch


class Digits32(DigitsDataModule):
    """Digits of 32 x 32 pixels, as many as CIFAR's, so that a network for these has its usual work."""

    def __init__(self, images: int, chunk: int) -> None:
        super().__init__(eval_batch_size=chunk)
        self.images = images

    def load_test(self) -> Any:
        found = super().load_test()
        found.images = found.images[: self.images].repeat_interleave(4, -1).repeat_interleave(4, -2)
        found.labels = found.labels[: self.images]
        return found


if __name__ == "__main__":
    _setting, _threads, _folder = json.loads(sys.argv[1])
    work(Setting(**_setting), _threads, Path(_folder))
