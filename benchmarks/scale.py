"""Throughput on several processes: ``python -m benchmarks.scale``.

Measures a PGD-10 adversarial training step (``PGDAT`` under a Lightning ``Trainer``) and an evaluation under PGD-10
(``Trainer.test`` with a store), both of the same images however many processes share them: one process of one thread, one of
two, two and four of one thread each. Steps of half the batch tell the cost model what does not depend on it. All processes
are started before anything is timed and wait for their turn; one side works at a time, round by round, each round beginning
with another. Time is wall time, from the word to start until the last process of a side is done, so the machine must be idle;
the median over rounds counts.

Requirement: two processes of one thread reach at least 0.9 of the throughput of one process of two threads, and every
prediction and verdict is the same on all sides.

A side whose threads are more than the machine's cores takes turns on them: it shows what processes cost, not what they gain.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torch.optim import SGD

from robust_pl import nets

from .scale_worker import DONE, WEIGHTS, Digits32, Setting
from .timing import Rounds, machine, print_machine

LIMIT = 0.9
SIDES = {"1 x 2": (1, 2), "1 x 1": (1, 1), "2 x 1": (2, 1), "4 x 1": (4, 1)}
"""Processes and threads of each."""
ONE, TWO = "1 x 2", "2 x 1"
STEP, HALF, TEST, REDUCE = "training step", "half a batch", "evaluation", "all-reduce"


class Group:
    """The processes of one side, which wait for their turn.

    Args:
        processes: how many.
        threads: of each.
        setting: see there.
        folder: for the outcome of its evaluations.
        port: where they meet.
    """

    def __init__(self, processes: int, threads: int, setting: Setting, folder: Path, port: int) -> None:
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads), "TORCHELASTIC_RUN_ID": str(port)}
        command = [sys.executable, "-m", "benchmarks.scale_worker", json.dumps([vars(setting), threads, str(folder)])]
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]

    def turn(self) -> tuple[float, list[Any]]:
        """Let all do the next thing; returns the seconds until the last is done, and what each says."""
        began = time.perf_counter()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [self.listen(process) for process in self.processes]
        return time.perf_counter() - began, said

    def listen(self, process: subprocess.Popen[str]) -> Any:
        """The next word of a process."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(DONE):
                return json.loads(line.removeprefix(DONE))
        raise RuntimeError(f"a process of the benchmark ended with {process.wait()}: its errors are above")

    def end(self) -> None:
        """Whatever happened."""
        for process in self.processes:
            process.kill()
            process.wait()


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """All sides; seconds of each round and the figures."""
    _prepare(setting, folder / WEIGHTS)
    ports = _free_ports(len(SIDES))
    groups = {
        name: Group(*size, setting, folder / name.replace(" ", ""), port)
        for (name, size), port in zip(SIDES.items(), ports, strict=True)
    }
    try:
        begun = [group.listen(process) for group in groups.values() for process in group.processes]
        parameters = begun[0]["parameters"]
        measured = {}
        for what in (STEP, HALF, TEST, REDUCE):
            rounds = measured[what] = Rounds(what, setting.rounds, SIDES)
            for turn, side in rounds.order():
                rounds.add(turn, side, groups[side].turn()[0])
    finally:
        for group in groups.values():
            group.end()
    tables = {side: _columns(folder / side.replace(" ", "") / "0" / "predictions.csv") for side in SIDES}
    bytes_s = {
        side: 2 * (size[0] - 1) / size[0] * 4 * parameters / median(measured[REDUCE].seconds[side])
        for side, size in SIDES.items()
        if size[0] > 1
    }
    points = [  # for the cost model: the round that was disturbed least
        {"processes": size[0], "batch": setting.batch // size[0] // part, "seconds": min(measured[what].seconds[side])}
        for side, size in SIDES.items()
        for what, part in ((STEP, 1), (HALF, 2))
        if size[1] == 1
    ]
    return {
        "setting": vars(setting),
        "steps": setting.steps,
        "cores": os.cpu_count(),
        "parameters": parameters,
        "allreduce_bytes_s": bytes_s[TWO],
        "allreduce_bytes_s_of": bytes_s,
        "points": points,
        "identical": all(table == tables[ONE] for table in tables.values()),
        "throughput": {what: 1 / measured[what].figures(ONE)[TWO]["ratio_median"] for what in ("training step", "evaluation")},
        "sides": {what: measured[what].figures(ONE) for what in (STEP, HALF, TEST)},
        "machine": machine(),
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, no two the same."""
    with ExitStack() as opened:
        found = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def _prepare(setting: Setting, path: Path) -> None:
    """Weights of a few steps on clean digits, so that predictions and verdicts are not all the same."""
    seed_everything(0, verbose=False)
    net = getattr(nets, setting.net)(in_channels=1)
    images, optimizer = Digits32(setting.images, setting.chunk).load_test(), SGD(net.parameters(), 0.05, momentum=0.9)
    for step in range(12):
        x, y = images.read((torch.arange(32) + 32 * step) % setting.images, None)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.save(net.state_dict(), path)


def _columns(path: Path) -> list[tuple[str, ...]]:
    """What is judged of each sample: its position, label, predictions and verdicts."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(("index", "label", "prediction", "right_"))]
    return [tuple(row[name] for name in names) for row in rows]


def show(found: dict[str, Any]) -> None:
    """The table and the verdict."""
    setting = found["setting"]
    table = Table(title=f"{setting['net']}, PGD-{setting['steps']}; processes x threads, medians of {setting['rounds']} rounds")
    for heading in ("", "side", "wall s", "images/s", f"of {ONE}", "min, max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what, images in ((STEP, setting["batch"]), (HALF, setting["batch"] // 2), (TEST, setting["images"])):
        for side, figures in found["sides"][what].items():
            speed = f"{images / figures['median_s']:.1f}"
            ratio = 1 / figures["ratio_median"]
            spread = f"{1 / figures['ratio_max']:.3f}, {1 / figures['ratio_min']:.3f}"
            table.add_row(what, side, f"{figures['median_s']:.3f}", speed, f"{ratio:.3f}", spread)
    console = Console()
    console.print(table)
    console.print(f"An all-reduce of the gradients moves {found['allreduce_bytes_s'] / 1e9:.2f} GB/s between two processes.")
    same = "the same" if found["identical"] else "NOT the same"
    console.print(f"Predictions and verdicts are {same} on all sides.")
    print_machine(console)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if the requirement is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="ResNet18")
    parser.add_argument("--batch", type=int, default=64, help="images a step, of all processes; a multiple of 8")
    parser.add_argument("--chunk", type=int, default=8, help="images an evaluation chunk")
    parser.add_argument("--images", type=int, default=128, help="images to evaluate, at most 360")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args(arguments))
    path = options.pop("json")
    if options["batch"] % 8:
        parser.error(f"--batch {options['batch']} must be a multiple of 8: four processes share it, and half of it")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Setting(**options), Path(folder))
    show(found)
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
    missed = not found["identical"] or any(found["throughput"][what] < LIMIT for what in (STEP, TEST))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
