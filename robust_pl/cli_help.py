"""What the command line answers at once: help, and what is wrong with how it is called.

Nothing here imports PyTorch or Lightning, which takes seconds. The parser of a run takes its subcommands from here, too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

DESCRIPTION = "Train, attack and measure robust vision models with Lightning."
CONFIG = "A YAML or JSON file. Before the subcommand its maps are named after subcommands; after it, it is one experiment."
RUNS = {
    "fit": "Train, validate under attack after every epoch, and keep the checkpoint that did best.",
    "validate": "Attack a network on the validation samples and show its accuracies.",
    "test": "Attack a network on the test samples, keep the outcome of each, and write a report.",
    "predict": "Attack a network on the test samples and keep the outcome of each, without metrics and report.",
}
"""Subcommands that need a Trainer, and what they do."""
COMMANDS = {
    "audit": "Check a finished evaluation in a fresh process: sums, images, predictions, accuracies.",
    "report": "Show everything that runs measured side by side, as one HTML page and as a table for papers.",
    "turntable": "Film a mesh or a fitted scene from all around, as GIF or MP4.",
}
"""Subcommands that need none."""
SUBCOMMANDS = RUNS | COMMANDS

_OPTIONS = ("-c", "--config", "--print_config")  # that may stand before the subcommand
_FILE = re.compile(r"[^:{}\n]+\.(ya?ml|json)")  # and neither an address nor YAML itself


def show_help() -> None:
    """Print what ``robust-pl --help`` prints."""
    parser = argparse.ArgumentParser(
        "robust-pl", description=DESCRIPTION, epilog="Begin with: robust-pl fit -c configs/quickstart.yaml"
    )
    parser.add_argument("--version", action="store_true", help="Show the version and exit.")
    parser.add_argument("-c", "--config", metavar="CONFIG", help=CONFIG)
    parser.add_argument("--print_config", nargs="?", metavar="FLAGS", help="Show the whole configuration and exit.")
    listed = parser.add_subparsers(
        title="subcommands", description="Each shows its own options by --help.", metavar="SUBCOMMAND"
    )
    for name, says in SUBCOMMANDS.items():
        listed.add_parser(name, help=says)
    parser.print_help()


def mistake(arguments: Sequence[str]) -> str | None:
    """What is wrong with a command line, as far as it can be told at once; None if nothing is.

    Args:
        arguments: of the command line, with the subcommand first.
    """
    known = ", ".join(SUBCOMMANDS)
    if not arguments:
        return f"name a subcommand, one of {known}: see robust-pl --help"
    first = arguments[0]
    if first.startswith("-") and not first.startswith(_OPTIONS):
        return f"{first} stands before the subcommand, where it is unknown: begin with one of {known}"
    if not first.startswith("-") and first not in SUBCOMMANDS:
        close = get_close_matches(first.lower(), SUBCOMMANDS, n=1)
        return f"{first!r} is no subcommand: " + (f"did you mean {close[0]!r}?" if close else f"choose one of {known}")
    if first.startswith("-") and not {*SUBCOMMANDS, "-h", "--help"}.intersection(arguments):
        return f"no subcommand is named: begin with one of {known}, such as robust-pl fit -c configs/quickstart.yaml"
    if len(arguments) == 1 and first in RUNS:
        return f"{first} needs a model and data: name an experiment, such as -c configs/quickstart.yaml"
    if first in RUNS and not arguments[1].startswith("-"):
        return f"{arguments[1]} follows {first} and no option: an experiment is named by -c, such as {first} -c {arguments[1]}"
    for config in configs_in(arguments):
        if _FILE.fullmatch(config) and not Path(config).expanduser().exists():
            return f"config={config} does not exist: name an experiment, such as -c configs/quickstart.yaml"
    return None


def configs_in(arguments: Sequence[str]) -> Iterator[str]:
    """The files that a command line gives by ``-c`` or ``--config``."""
    for here, following in pairwise([*arguments, ""]):
        if here in ("-c", "--config"):
            yield following
        elif here.startswith(("-c=", "--config=")):
            yield here.partition("=")[2]
