"""An environment of its own for what a benchmark is compared with: packages that are no dependencies of the library.

``python -m benchmarks.NAME --install FOLDER ...`` makes a virtual environment in FOLDER, with this checkout, the running
environment's version of torch and the other packages, and runs the benchmark there with the remaining arguments. pip asks the
indices that it is configured for, ``PIP_EXTRA_INDEX_URL`` and ``PIP_FIND_LINKS`` included. A folder that was made so is used
again as it is, without network; one whose list of packages is another one is completed first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DONE = "installed_for_benchmarks.txt"


@dataclass(frozen=True)
class Packages:
    """What one call of ``pip install`` is given.

    Args:
        names: with versions, as pip takes them.
        alone: without what they ask for, which then is there already or is not needed.
    """

    names: tuple[str, ...]
    alone: bool = False

    @property
    def arguments(self) -> list[str]:
        """Of ``pip install``."""
        return [*(["--no-deps"] if self.alone else []), *self.names]


def add_install_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--install FOLDER``."""
    parser.add_argument(
        "--install", type=Path, metavar="FOLDER", help="make an environment with the peers there, and run in it"
    )


def run_installed(module: str, packages: Sequence[Packages], argv: Sequence[str] | None) -> None:
    """Where ``--install`` is among the arguments: make the environment, run the module there, and exit with its code.

    Args:
        module: such as ``benchmarks.peers``.
        packages: what is installed beside this checkout and torch, in this order.
        argv: all arguments; None takes those of this process.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_install_option(parser)
    known, rest = parser.parse_known_args(argv)
    if known.install is None:
        return
    python = make(known.install, packages)
    raise SystemExit(subprocess.run([str(python), "-m", module, *rest]).returncode)


def make(folder: Path, packages: Sequence[Packages]) -> Path:
    """Make the environment unless it is there, and return its Python.

    Raises:
        SystemExit: if pip fails, with what it said above.
    """
    python = folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # The local part, such as +cpu, is part of the version: an index that lacks this build is refused rather than replaced.
    wanted = [Packages((f"torch=={torch.__version__}",)), Packages(("-e", str(ROOT))), *packages]
    kept = folder / DONE
    said = "".join(" ".join(part.arguments) + "\n" for part in wanted)
    if kept.is_file() and kept.read_text() == said:
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    for part in wanted:
        _run([str(python), "-m", "pip", "install", "--quiet", *part.arguments])
    kept.write_text(said)
    return python


def _run(command: list[str]) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"this command failed: {' '.join(command)}")
