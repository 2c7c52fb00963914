"""How long the command line takes to start: ``python -m benchmarks.startup``.

Runs each command in a process of its own, interleaved with a bare ``import lightning.pytorch.cli``, and counts the CPU time of
the whole process. Bytecode is written in the warm-up, as it is by a user's first call, also where the environment forbids it.

Requirement: ``robust-pl --help`` takes at most 1.5 times the bare import. It is answered without PyTorch and Lightning. What
needs them imports them with the garbage collector off, and so takes less than the bare import, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from rich.console import Console
from rich.table import Table

from .timing import Rounds, machine, print_machine

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.5
BARE = "bare"
COMMANDS: dict[str, tuple[str, str, int]] = {
    BARE: ("import lightning.pytorch.cli", "-c|import lightning.pytorch.cli", 0),
    "version": ("robust-pl --version", "-m|robust_pl|--version", 0),
    "help": ("robust-pl --help", "-m|robust_pl|--help", 0),
    "no_arguments": ("robust-pl (wrong usage)", "-m|robust_pl", 2),
    "fit_help": ("robust-pl fit --help", "-m|robust_pl|fit|--help", 0),
    "print_config": (
        "robust-pl fit -c CONFIG --print_config",
        "-m|robust_pl|fit|-c|configs/quickstart.yaml|--print_config",
        0,
    ),
}
"""Name -> how it is shown, what Python is called with, and the exit status that it must end with."""


def cpu_seconds(name: str) -> float:
    """CPU time, user's and system's, of one process that runs a command.

    Raises:
        RuntimeError: if it ends otherwise than it should.
    """
    shown, arguments, status = COMMANDS[name]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = getrusage(RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments.split("|")], cwd=ROOT, env=environment, capture_output=True, text=True)
    after = getrusage(RUSAGE_CHILDREN)
    if done.returncode != status:
        raise RuntimeError(f"{shown} ended with {done.returncode} and not {status}: {done.stderr.strip()[-500:]}")
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def measure(names: list[str], count: int) -> Rounds:
    """Rounds of all these commands and the bare import."""
    rounds = Rounds("start-up", count, (BARE, *names))
    for turn, name in rounds.order():
        rounds.add(turn, name, cpu_seconds(name))
    return rounds


def _print(rounds: Rounds) -> None:
    table = Table(title=f"Start-up, medians of {rounds.count} rounds; ratios to the bare import")
    for column in ("command", "CPU seconds", "ratio", "min, max"):
        table.add_column(column, justify="left" if column == "command" else "right", no_wrap=column != "command")
    for name, figures in rounds.figures(BARE).items():
        spread = f"{figures['ratio_min']:.3f}, {figures['ratio_max']:.3f}"
        table.add_row(COMMANDS[name][0], f"{figures['median_s']:.2f}", f"{figures['ratio_median']:.3f}", spread)
    console = Console()
    console.print(table)
    print_machine(console)
    if "help" in rounds.sides:
        ratio = rounds.figures(BARE)["help"]["ratio_median"]
        console.print(f"robust-pl --help: {ratio:.3f} of the bare import (at most {LIMIT})", highlight=False)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [name for name in COMMANDS if name != BARE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="Start-up time of the command line.")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one for warming up")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="leave the other commands out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    rounds = measure(args.only, args.rounds)
    _print(rounds)
    if args.json is not None:
        settings = {"rounds": args.rounds, "only": args.only}
        report = {"settings": settings, "machine": machine(), "limit": LIMIT, "commands": rounds.figures(BARE)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
