"""Peak memory of a PGD adversarial training step of ours and of the plain loop: ``python -m benchmarks.memory``.

Each side trains in a process of its own, see ``benchmarks/training.py``: ours under a Lightning ``Trainer``, and the plain loop
in a process that never imports Lightning. After some steps of warming up three figures are taken:

- ``before``: what lies in memory between two steps: libraries, weights, gradients, momentum, the batch.
- ``peak``: the highest in the steps that follow.
- ``step``: the difference, which is what a step takes.

On a CPU they are resident bytes of the process. Freed memory would stay resident, more of it the longer a process runs, and
count as ``before``; so glibc is told to give every block of 64 KiB or more back (``MALLOC_MMAP_THRESHOLD_``), on both sides. On
CUDA they are the bytes that PyTorch's allocator gave out, libraries not included.

Requirement: with the defaults ``step`` is at most 1.05 times that of the plain loop. ``peak`` stands beside it, and on a CPU
includes what Lightning's and our own modules take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from robust_pl import nets
from robust_pl.callbacks.monitors.memory import OF_PROCESS_AT_ALL_TIMES, PeakMemory

from .timing import machine, print_machine
from .training import TRAININGS, Batch, random_batch

LIMIT = 1.05
# Fixed, since glibc else raises it as large blocks are freed, and keeps them.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Figures = dict[str, Any]


class Watched:
    """Hands out one batch again and again, and notes the memory before and during the last steps.

    Args:
        batch: (x, y).
        warm_up: steps before.
        measured: steps of which the highest peak counts.
    """

    def __init__(self, batch: Batch, warm_up: int, measured: int) -> None:
        self.batch, self.warm_up, self.measured = batch, warm_up, measured
        device = batch[0].device
        self.before, self.peak = PeakMemory(device), PeakMemory(device)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.warm_up + self.measured):
            if step == self.warm_up:
                self.before.begin()
                self.before.read()
                self.peak.begin()
            yield self.batch
        self.peak.read()

    def figures(self) -> Figures:
        """Bytes, and what they are of."""
        before, peak = self.before.peak, self.peak.peak
        if before is None or peak is None or self.peak.of == OF_PROCESS_AT_ALL_TIMES:
            raise SystemExit("this system does not tell the peak of a part of a run: measure on Linux, or on CUDA")
        return {"before": before, "peak": peak, "step": peak - before, "of": self.peak.of}


def measure_here(args: argparse.Namespace) -> Figures:
    """Figures of ``args.side`` in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    net = getattr(nets, args.net)(in_channels=3).to(device)
    watched = Watched(random_batch(args.batch_size, 32, 10, device), args.warm_up, args.measured)
    TRAININGS[args.side](net, iter(watched), args.warm_up + args.measured, args.steps)
    return watched.figures()


def in_a_process(args: argparse.Namespace, side: str) -> Figures:
    """Figures of a side in a process of its own."""
    given = {key: value for key, value in vars(args).items() if key not in ("json", "side")}
    options = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks.memory", *options, "--side", side]
    done = subprocess.run(command, env={**os.environ, **GIVE_BACK}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process of {side} failed: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def print_figures(found: dict[str, Figures], ratios: dict[str, float], args: argparse.Namespace) -> None:
    """Print the table, and how the requirement stands."""
    console, device = Console(width=120), torch.device(args.device)
    table = Table(title=f"PGD-{args.steps} training step, {args.net}, batch {args.batch_size}, fp32")
    for column in ("MiB", "step", "peak", "before"):
        table.add_column(column, justify="left" if column == "MiB" else "right")
    for side, figures in found.items():
        table.add_row(side, *(f"{figures[name] / 2**20:.1f}" for name in ("step", "peak", "before")))
    table.add_row("ratio", *(f"{ratios[name]:.3f}" for name in ("step", "peak", "before")))
    console.print(table)
    lines = [
        f"step: {ratios['step']:.3f} times that of lean (with the defaults at most {LIMIT})",
        f"measured: {found['ours']['of']}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    print_machine(console, device)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory beside a hand-written loop.")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--warm-up", type=int, default=2, help="training steps before")
    parser.add_argument("--measured", type=int, default=2, help="training steps of which the highest peak counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "PreActResNet18", "SmallCNN"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--side", choices=tuple(TRAININGS), help="measure one side in this process, and print JSON alone")
    args = parser.parse_args(argv)
    for name in ("batch_size", "steps", "warm_up", "measured", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure both sides, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    if args.side is not None:
        print(json.dumps(measure_here(args)), flush=True)
        return
    torch.set_num_threads(args.threads)
    found = {side: in_a_process(args, side) for side in TRAININGS}
    ratios = {name: found["ours"][name] / found["lean"][name] for name in ("step", "peak", "before")}
    print_figures(found, ratios, args)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "side")}
        report = {"settings": settings, "machine": machine(torch.device(args.device)), **found, "ratio": ratios}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
