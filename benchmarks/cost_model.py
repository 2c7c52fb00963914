"""What a step of adversarial training costs on W processes: time, memory and what is sent. ``python -m benchmarks.cost_model``.

A model on paper. Compute is counted in forward passes of an image: an attack step is one forward and one backward pass to the
pixels, 2 units, a training pass 3. Every process does its share of the batch; what it sends is hidden behind the backward pass
of the training loss, as far as that lasts. :func:`fit` finds the two numbers that no data sheet says, seconds a unit and
seconds a step beside, from what ``python -m benchmarks.scale`` measured, and says how far off the model is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

Strategy = Literal["ddp", "sharded step", "sharded pass"]
ATTACK_STEP, TRAINING_PASS, BACKWARD = 2.0, 3.0, 2.0
FLOAT = 4


@dataclass(frozen=True)
class Device:
    """What the processes run on.

    Args:
        unit_s: seconds of one forward pass of one image, in a batch.
        step_s: seconds a step that do not depend on the batch: the optimizer, the loop around it.
        devices: how many of the processes compute at the same time; on a CPU, cores over threads. The others take turns.
    """

    unit_s: float
    step_s: float = 0.0
    devices: int = 1 << 30


@dataclass(frozen=True)
class Link:
    """How processes are connected.

    Args:
        bytes_s: bytes a second that each process sends, and receives, in a ring.
        hop_s: seconds until the first byte arrives.
        inside: processes of one machine.
        outside_s: bytes a second that a machine sends to the next one, over all its cards; None as inside. Rings that leave a
            machine share them, so that a ring is as fast as the slower of the two.
    """

    bytes_s: float
    hop_s: float = 0.0
    inside: int = 1 << 30
    outside_s: float | None = None

    def ring_s(self, size: float, processes: int, turns: int) -> float:
        """Seconds of ``turns`` rounds of a ring over tensors of ``size`` bytes: 2 is an all-reduce, 1 gathers or scatters."""
        if processes == 1:
            return 0.0
        slowest = self.bytes_s if processes <= self.inside else min(self.bytes_s, self.outside_s or self.bytes_s)
        return turns * (processes - 1) * (size / processes / slowest + self.hop_s)


@dataclass(frozen=True)
class Work:
    """One optimizer step.

    Args:
        batch: images a process.
        attack_steps: forward and backward passes to the pixels for each image.
        parameters: of the network.
        activations: bytes that one image keeps until the backward pass.
        states: numbers that the optimizer keeps of each parameter: SGD with momentum 1, AdamW 2.
        averages: weight averages beside the weights.
    """

    batch: int
    attack_steps: int
    parameters: int
    activations: float = 0.0
    states: int = 1
    averages: int = 0

    @property
    def units(self) -> float:
        """Forward passes of an image that one image costs: 23 for PGD-10."""
        return ATTACK_STEP * self.attack_steps + TRAINING_PASS

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return FLOAT * self.parameters


@dataclass(frozen=True)
class Cost:
    """What a step costs each process.

    Args:
        seconds: of the step.
        hidden_s: of communication that compute hides; it is not part of ``seconds``.
        shown_s: of communication that nothing hides; it is.
        sent: bytes.
        memory: bytes on the device, at most.
    """

    seconds: float
    hidden_s: float
    shown_s: float
    sent: float
    memory: float


def cost(work: Work, processes: int, device: Device, link: Link, strategy: Strategy = "ddp") -> Cost:
    """Of one step on so many processes, each with ``work.batch`` images."""
    turns_taken = max(1.0, processes / device.devices)
    image_s = device.unit_s * work.batch * turns_taken
    compute, backward = image_s * work.units, image_s * BACKWARD
    ring = link.ring_s(work.bytes, processes, 1)
    share = (processes - 1) / processes
    if strategy == "ddp":
        # The last bucket, of 25 MB at most, has nothing to hide behind.
        total, last = 2 * ring, 2 * ring * min(1.0, 25e6 / work.bytes)
        shown, rounds = max(total - backward, min(total, last)), 2
    elif strategy == "sharded step":  # gathered before the attack, and scattered as DDP reduces
        last = ring * min(1.0, 25e6 / work.bytes)
        total, rounds = 2 * ring, 2
        shown = ring + max(ring - backward, min(ring, last))
    else:  # each pass of attack and loss gathers, forward and backward, one block ahead of the compute
        rounds = 2 * work.attack_steps + 3
        total = rounds * ring
        shown = max(total - compute, ring / 10)
    seconds = compute + device.step_s * turns_taken + shown
    return Cost(seconds, total - shown, shown, rounds * share * work.bytes, memory(work, processes, strategy))


def memory(work: Work, processes: int, strategy: Strategy) -> float:
    """Bytes on each device: weights, gradients and optimizer states in float32, and the activations of the training pass."""
    part = 1.0 if strategy == "ddp" else 1 / processes
    buckets = 1.0 if processes > 1 else 0.0  # in which DDP sends gradients
    beside = {"ddp": buckets, "sharded step": 1.0, "sharded pass": 0.1}[strategy]
    kept = (2 + work.states + work.averages) * part + beside
    return kept * work.bytes + work.activations * work.batch


def images_a_second(work: Work, processes: int, found: Cost) -> float:
    """Training images of all processes."""
    return work.batch * processes / found.seconds


@dataclass(frozen=True)
class Measured:
    """A step that was timed."""

    work: Work
    processes: int
    seconds: float


def fit(points: Sequence[Measured], link: Link, devices: int) -> tuple[Device, list[float]]:
    """The device that explains the measured steps best, and the relative error at each of them (model / measured - 1).

    Least squares of relative errors over ``unit_s`` and ``step_s``, both at least 0; what is sent is taken from ``link``.

    Raises:
        ValueError: if there are fewer than two points.
    """
    if len(points) < 2:
        raise ValueError(f"{len(points)} measured steps do not tell seconds a unit from seconds a step: measure two or more")
    device = Device(0.0, 0.0, devices)
    for _ in range(20):  # what is hidden depends on what is fitted
        rows, wanted = [], []
        for point in points:
            turns = max(1.0, point.processes / devices)
            shown = cost(point.work, point.processes, device, link).shown_s if device.unit_s else 0.0
            rows.append([point.work.units * point.work.batch * turns / point.seconds, turns / point.seconds])
            wanted.append(1 - shown / point.seconds)
        matrix, target = np.array(rows), np.array(wanted)
        unit, step = nnls(matrix, target)[0]
        device = replace(device, unit_s=float(unit), step_s=float(step))
    errors = [cost(p.work, p.processes, device, link).seconds / p.seconds - 1 for p in points]
    return device, errors


def main() -> None:
    """Fit the model to a file of ``benchmarks.scale``, or predict from numbers of the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost_model", description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks.scale: fit to it, and print the errors")
    parser.add_argument("--images_s", type=float, help="images a second of PGD training on one GPU, measured")
    parser.add_argument("--parameters", type=float, default=11.17e6, help="of the network; default ResNet-18")
    parser.add_argument("--activations", type=float, default=0.0, help="bytes an image keeps for the backward pass")
    parser.add_argument("--batch", type=int, default=128, help="images a process")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--states", type=int, default=1, help="numbers the optimizer keeps of each parameter")
    parser.add_argument("--link", type=float, default=150e9, help="bytes/s of a GPU in its machine; NVLink is assumed")
    parser.add_argument("--network", type=float, default=12.5e9, help="bytes/s of a machine; 100 Gbit/s is assumed")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    arguments = parser.parse_args()
    if arguments.measured is None and arguments.images_s is None:
        parser.error("give --measured FILE, --images_s NUMBER, or both")
    if arguments.measured is not None:
        show_fit(json.loads(arguments.measured.read_text()))
    if arguments.images_s is not None:
        show_prediction(arguments)


def show_fit(measured: dict[str, Any]) -> None:
    """Print what was measured, what the model says, and how far off it is."""
    points = [
        Measured(Work(p["batch"], measured["steps"], measured["parameters"]), p["processes"], p["seconds"])
        for p in measured["points"]
    ]
    link = Link(measured["allreduce_bytes_s"])
    device, errors = fit(points, link, measured["cores"])
    table = Table(title=f"{device.unit_s * 1e3:.3f} ms a forward pass and image, {device.step_s * 1e3:.1f} ms a step beside")
    for heading in ("processes", "batch a process", "measured s", "model s", "error"):
        table.add_column(heading, justify="right")
    for point, error in zip(points, errors, strict=True):
        table.add_row(
            *(str(n) for n in (point.processes, point.work.batch)),
            *(f"{s:.3f}" for s in (point.seconds, point.seconds * (1 + error))),
            f"{error:+.1%}",
        )
    Console().print(table)


def show_prediction(asked: argparse.Namespace) -> None:
    """Print step time, images a second, efficiency, bytes sent and memory for each number of GPUs and strategy."""
    work = Work(asked.batch, asked.steps, int(asked.parameters), asked.activations, asked.states)
    device = Device(1 / asked.images_s / work.units)
    link = Link(asked.link, 10e-6, inside=8, outside_s=asked.network)
    table = Table(title=f"PGD-{asked.steps}, {asked.batch} images a GPU, from {asked.images_s:,.0f} images/s on one")
    for heading in ("GPUs", "strategy", "step ms", "of it sending", "images/s", "efficiency", "sent MB", "memory GB"):
        table.add_column(heading, justify="right")
    for gpus in asked.gpus:
        for strategy in ("ddp",) if gpus == 1 else ("ddp", "sharded step", "sharded pass"):
            found = cost(work, gpus, device, link, strategy)
            speed = images_a_second(work, gpus, found)
            table.add_row(
                str(gpus),
                strategy,
                f"{found.seconds * 1e3:.2f}",
                f"{found.shown_s * 1e3:.2f}",
                f"{speed:,.0f}",
                f"{speed / gpus / asked.images_s:.1%}",
                f"{found.sent / 1e6:,.0f}",
                f"{found.memory / 1e9:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
