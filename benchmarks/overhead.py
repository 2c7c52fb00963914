"""What the library costs beside a hand-written loop: ``python -m benchmarks.overhead``.

Measures a PGD attack and a PGD adversarial training step of ours against ``benchmarks/lean.py``, in one process and
interleaved, on random images (only the cost is of interest). The training step is the user's: ``PGDAT`` under a
Lightning ``Trainer``, and all that the Trainer does between two batches counts as ours. Progress bar, logger and
checkpoints are off, and what happens once a run (the check of the first batch) falls into the warm-up. Both sides start
from the same weights and take the same batches.

Requirement: with the defaults the attack takes at most 0.82 times, the whole step at most 0.85 times as long.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from robust_pl import nets
from robust_pl.callbacks import PGD

from . import lean
from .timing import Pairs, compare, machine, print_table
from .training import EPS, STEP_SIZE, fit, sgd

LIMITS = {"attack": 0.82, "training_step": 0.85}


@dataclass(frozen=True)
class Setting:
    """What both sides share: a network, its batches of (x, y), and the number of attack steps."""

    net: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    steps: int


def measure_attack(setting: Setting, pairs: int) -> Pairs:
    """PGD on a network in eval mode with frozen parameters; the same batch each time."""
    net = copy.deepcopy(setting.net).eval().requires_grad_(False)
    x, y = setting.batches[0]
    attack = PGD(EPS, STEP_SIZE, setting.steps)
    return compare(
        f"PGD-{setting.steps} attack",
        pairs,
        ours=lambda: attack(net, x, y),
        lean=lambda: lean.pgd(net, x, y, EPS, STEP_SIZE, setting.steps),
    )


def measure_training(setting: Setting, pairs: int) -> Pairs:
    """PGD adversarial training; batch i is for both sides of pair i."""
    measured = Pairs(f"PGD-{setting.steps} training step", pairs)
    net = copy.deepcopy(setting.net)
    optimizer = sgd(net.parameters())

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Hand the Trainer a batch where it is our turn, and train by hand in between.

        From here to the Trainer's next request, all time is ours.
        """
        for pair, side in measured.order():
            batch = setting.batches[pair % len(setting.batches)]
            began = time.process_time()
            if side == "ours":
                yield batch
            else:
                lean.training_step(net, optimizer, *batch, EPS, STEP_SIZE, setting.steps)
            measured.add(pair, side, time.process_time() - began)

    fit(copy.deepcopy(setting.net), batches(), pairs + 1, setting.steps)
    return measured


def agreement(setting: Setting) -> dict[str, float]:
    """Largest difference between the two sides where they start from the same point: both must do the same work.

    In float64 and on a few images, since ours rounds otherwise, and in float32 that flips the sign of some tiny gradient.
    """
    x, y = setting.batches[0]
    x, y = x[:4].double(), y[:4]
    setting = Setting(copy.deepcopy(setting.net).double(), [(x, y)], setting.steps)
    net = copy.deepcopy(setting.net).eval().requires_grad_(False)
    ours = PGD(EPS, STEP_SIZE, setting.steps, random_start=False)(net, x, y)
    by_hand = lean.pgd(net, x, y, EPS, STEP_SIZE, setting.steps, random_start=False)

    net = copy.deepcopy(setting.net)
    loss = lean.training_step(net, sgd(net.parameters()), x, y, EPS, STEP_SIZE, setting.steps, random_start=False)
    method, trainer = fit(copy.deepcopy(setting.net), iter([(x, y)]), 1, setting.steps, random_start=False)
    after, expected = method.net.state_dict(), net.state_dict()
    return {
        "x_adv": _distance(ours, by_hand),
        "loss": _distance(trainer.callback_metrics["train/loss"], loss),
        "weights": max(_distance(after[name], expected[name]) for name in expected),
    }


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="Cost beside a hand-written loop.")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one for warming up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "PreActResNet18", "SmallCNN"))
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
    setting = Setting(net, batches, args.steps)

    console = Console()
    difference = agreement(setting)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in difference.items())
    console.print(
        f"Largest difference in float64 without a random start, ours to lean: {shown}", highlight=False, soft_wrap=True
    )
    measured = {"attack": measure_attack(setting, args.pairs), "training_step": measure_training(setting, args.pairs)}
    print_table(
        list(measured.values()),
        f"{args.net}, batch {args.batch_size}, fp32, random images: medians of {args.pairs} pairs",
    )
    for name, pairs in measured.items():
        ratio = pairs.summary()["ratio_median"]
        console.print(f"{pairs.what}: {ratio:.3f} (with the defaults at most {LIMITS[name]})", highlight=False)
    if args.json is not None:
        figures = {name: pairs.summary() for name, pairs in measured.items()}
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        report = {"settings": settings, "machine": machine(), "difference": difference, **figures}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
