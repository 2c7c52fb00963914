"""What common corruptions cost: ``python -m benchmarks.corruptions``.

Corrupts test images of CIFAR-10 in all 15 ways at all 5 severities, and measures a ResNet-20 on all of them. Seconds are of the
wall and of the CPU, summed over severities; on a machine that is not idle the latter count.

Requirement: with the defaults the corruptions of 1,000 images take less than 60 s on two threads, the network not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robust_pl import nets
from robust_pl.data import CIFAR10DataModule
from robust_pl.functional.corruptions import BENCHMARK, CORRUPTIONS, SEVERITIES, corrupt

from .timing import machine

LIMIT = 60
Seconds = dict[str, float]


def measure(
    x: Tensor, corruptions: tuple[str, ...], batch_size: int, net: nn.Module | None
) -> tuple[dict[str, Seconds], Seconds]:
    """Seconds of each corruption, and of the network on all images that were made."""
    seconds, of_net = {name: {"wall": 0.0, "cpu": 0.0} for name in corruptions}, {"wall": 0.0, "cpu": 0.0}
    for index in torch.arange(len(x)).split(batch_size):
        for name in corruptions:
            for severity in SEVERITIES:
                with _Clock(seconds[name]):
                    made = corrupt(x[index], name, severity, index)
                if net is not None:
                    with _Clock(of_net), torch.inference_mode():
                        net(made)
    return seconds, of_net


class _Clock:
    """Adds the time that passes to seconds."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds["wall"] += time.perf_counter() - self.began[0]
        self.seconds["cpu"] += time.process_time() - self.began[1]


def summed(seconds: dict[str, Seconds]) -> Seconds:
    """Over all corruptions."""
    return {key: sum(one[key] for one in seconds.values()) for key in ("wall", "cpu")}


def _print(seconds: dict[str, Seconds], of_net: Seconds, title: str, net: str) -> None:
    table = Table(title=title)
    for name in ("", "wall s", "CPU s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    made = summed(seconds)
    both = {key: made[key] + of_net[key] for key in made}
    rows = [*seconds.items(), ("all corruptions", made)]
    if net != "none":
        rows += [(f"{net} on them", of_net), ("both", both)]
    for name, one in rows:
        table.add_row(name, f"{one['wall']:.2f}", f"{one['cpu']:.2f}", end_section=name == list(seconds)[-1])
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False, soft_wrap=True)
    console.print(f"corruptions: {made['wall']:.1f} s (with the defaults less than {LIMIT} s)", highlight=False)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruptions", description="Cost of common corruptions.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32, help="height and width; others than 32 are random pixels")
    parser.add_argument("--random", action="store_true", help="random pixels in place of CIFAR-10's")
    parser.add_argument("--extra", action="store_true", help="also the four beside the benchmark")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet20", choices=("ResNet20", "ResNet18", "SmallCNN", "none"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    for name in ("images", "size", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.random or args.size != 32:
        x = torch.randint(256, (args.images, 3, args.size, args.size)) / 255
    else:
        x = CIFAR10DataModule().load_test().read(torch.arange(args.images), None)[0]
    corruptions = CORRUPTIONS if args.extra else BENCHMARK
    net = None if args.net == "none" else getattr(nets, args.net)(in_channels=3).eval()
    measure(x[:4], corruptions, 4, net)  # tables and textures are made once
    seconds, of_net = measure(x, corruptions, args.batch_size, net)
    title = f"{len(corruptions)} corruptions x 5 severities, {args.images} images of {args.size} x {args.size} pixels"
    _print(seconds, of_net, title, args.net)
    if args.json is not None:
        settings: dict[str, Any] = {key: value for key, value in vars(args).items() if key != "json"}
        figures = {"seconds": seconds, "corruptions": summed(seconds), "net": of_net}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
