"""What a weight callback costs on top of a training step: ``python -m benchmarks.callbacks``.

Measures a PGD-10 adversarial training step of ResNet-18 under a Lightning ``Trainer`` with a callback against one without it,
in one training and interleaved: the callback is among the trainer's in every other step. Images are random, since only the
cost is of interest. Validation, checkpoints and what happens once a run are left out.

Requirement: with the defaults the median ratio is at most 1.02 for EMA, and 1.15 for AWP, which adds a forward and a backward
pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD

from robust_pl import nets
from robust_pl.callbacks import AWP, EMA, PGD
from robust_pl.methods import PGDAT

from .timing import Pairs, machine, print_table

EPS, STEP_SIZE = 8 / 255, 2 / 255
Batch = tuple[Tensor, Tensor]
CALLBACKS: dict[str, tuple[Callable[[], Callback], float]] = {
    "EMA": (lambda: EMA(0.999), 1.02),
    # Of 10 forward and 10 backward passes to the image, and one of each to the weights: three units more beside 23.
    "AWP": (lambda: AWP(0.01), 1.15),
}
"""Name -> how it is built, and the most that a step with it may cost, as a multiple of one without."""


class Turns:
    """Training batches that put a callback among the trainer's in every other step, and record the time of each step.

    From one request of the Trainer for a batch to the next, all time is that of the step. The Trainer is told one batch more
    than there is, so that it does not fetch ahead, and asks again after the last one.

    Args:
        measured: gets the times.
        callback: with it, a step is ``ours``, and without it ``lean``.
        trainer: that trains on these batches.
        batches: batch i is for both sides of pair i.
    """

    def __init__(self, measured: Pairs, callback: Callback, trainer: Trainer, batches: list[Batch]) -> None:
        self.measured, self.callback, self.trainer, self.batches = measured, callback, trainer, batches

    def __len__(self) -> int:
        return 2 * (self.measured.count + 1) + 1

    def __iter__(self) -> Iterator[Batch]:
        for pair, side in self.measured.order():
            others = [callback for callback in self.trainer.callbacks if callback is not self.callback]
            self.trainer.callbacks[:] = [*others, self.callback] if side == "ours" else others
            began = time.process_time()
            yield self.batches[pair % len(self.batches)]
            self.measured.add(pair, side, time.process_time() - began)


def measure(name: str, net: nn.Module, batches: list[Batch], steps: int, pairs: int) -> Pairs:
    """Time of a step with the callback ``name``, and without it."""
    callback = CALLBACKS[name][0]()
    measured = Pairs(f"PGD-{steps} training step with {name}", pairs)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    method = PGDAT(copy.deepcopy(net), PGD(EPS, STEP_SIZE, steps), optimizer=_sgd)
    trainer.fit(method, Turns(measured, callback, trainer, batches))
    return measured


def _sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.callbacks", description="Cost of weight callbacks.")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one for warming up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "PreActResNet18", "SmallCNN"))
    parser.add_argument("--only", nargs="+", choices=tuple(CALLBACKS), default=tuple(CALLBACKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    for name in ("pairs", "batch_size", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = getattr(nets, args.net)(in_channels=3)
    shape = (args.batch_size, 3, 32, 32)
    batches = [(torch.randint(256, shape) / 255, torch.randint(10, shape[:1])) for _ in range(args.pairs + 1)]
    measured = {name: measure(name, net, batches, args.steps, args.pairs) for name in args.only}
    title = f"{args.net}, batch {args.batch_size}, fp32, random images: medians of {args.pairs} pairs, with and without"
    print_table(list(measured.values()), title)
    for name, pairs in measured.items():
        limit = CALLBACKS[name][1]
        line = f"{name}: {pairs.summary()['ratio_median']:.3f} (with the defaults at most {limit})"
        Console().print(line, highlight=False)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        figures = {name: pairs.summary() for name, pairs in measured.items()}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
