"""Commands that need no Trainer: ``robust-pl audit``, ``robust-pl report`` and ``robust-pl turntable``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ._quick import quickly
from .cli_help import COMMANDS

if TYPE_CHECKING:
    import torch

    from .data import ImageDataModule


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"robust-pl: error: {message}: see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def audit(arguments: Sequence[str]) -> None:
    """``robust-pl audit RUN``: ends the process with 1 where anything is wrong.

    Args:
        arguments: what follows the command.
    """
    parser = _Parser("robust-pl audit", description=COMMANDS["audit"])
    parser.add_argument("run", type=Path, help="folder of a run, or of one of its evaluations")
    parser.add_argument("--device", default="cpu", help="where the network runs, such as cuda")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="CLASS", help="class path of your own that the run may import"
    )
    parser.add_argument("--ckpt_path", type=Path, help="where the checkpoint is now, if it is not where it was")
    options = parser.parse_args(arguments)
    if not options.run.is_dir():
        raise FileNotFoundError(f"{options.run} is not a folder: name a run, such as runs/quickstart")
    with quickly("torch"):
        import torch
        from rich.progress import track

        from .evaluation.audit import audit as check
        from .evaluation.audit import evaluations
        from .evaluation.rebuild import autocast_of, dtype_of, rebuild

    passed = True
    for folder in evaluations(options.run):
        model, data = rebuild(folder, options.trust, options.ckpt_path)
        dtype = dtype_of(folder)

        def read(index: torch.Tensor, data: ImageDataModule = data, dtype: torch.dtype = dtype) -> tuple[Any, Any]:
            x, y = data.test_set.read(index, None)
            return x.to(dtype), y

        found = check(
            folder,
            model.to(torch.device(options.device), dtype),
            read,
            autocast=autocast_of(folder, options.device),
            watch=lambda batches, folder=folder: track(batches, description=f"auditing {folder}"),
        )
        print(found)
        passed &= found.passed
    if not passed:
        sys.exit(1)


def report(arguments: Sequence[str]) -> None:
    """``robust-pl report RUN [RUN ...]``: writes the page, and tells what could not be read.

    Args:
        arguments: what follows the command.
    """
    parser = _Parser("robust-pl report", description=COMMANDS["report"])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="PAGE", help="(default: report.html)")
    parser.add_argument("--markdown", type=Path, metavar="TABLE", help="write the table for papers here, too")
    parser.add_argument("--title", default="Robustness report", help="of the page (default: Robustness report)")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="CSV",
        help="accuracies data,acc_id,acc_ood of standard networks in [0, 1], from which effective robustness is told",
    )
    options = parser.parse_args(arguments)
    for option, path in (("--output", options.output), ("--markdown", options.markdown)):
        if path is not None and path.is_dir():
            raise ValueError(f"{option} {path} is a folder: name a file in it")
    with quickly("torch"):
        from .callbacks.store.files import write
        from .evaluation.baselines import read_baselines
        from .evaluation.gather import gather
        from .report.html import as_page, paper_markdown

    baselines = None if options.baseline is None else read_baselines(options.baseline)
    runs = gather(options.runs)
    page = as_page(runs, options.title, baselines)
    for run in runs:
        for gap in run.gaps:
            print(f"robust-pl: {run.label}: {gap}", file=sys.stderr)
    write(options.output, page.encode())
    print(options.output)
    if options.markdown is not None:
        write(options.markdown, paper_markdown(runs).encode())
        print(options.markdown)


def turntable(arguments: Sequence[str]) -> None:
    """``robust-pl turntable SCENE --output FILM``: writes the film.

    Args:
        arguments: what follows the command.
    """
    parser = _Parser("robust-pl turntable", description=COMMANDS["turntable"])
    parser.add_argument("scene", type=Path, help="a mesh (.obj, .ply, .glb, .gltf), or a checkpoint of a fitted field (.ckpt)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILM", help="file to write, .gif or .mp4")
    parser.add_argument("--elevation", type=float, default=20.0, help="of the camera, in degrees (default: 20)")
    parser.add_argument("--frames", type=int, default=48, help="of one turn (default: 48)")
    parser.add_argument("--fps", type=int, default=12, help="frames a second (default: 12)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default: 256)")
    parser.add_argument("--distance", type=float, help="of the camera from the origin; by default all of the scene is seen")
    parser.add_argument("--device", default="cpu", help="where it is rendered, such as cuda")
    options = parser.parse_args(arguments)
    with quickly("torch"):
        from .report.turntable import write_turntable
        from .scenes import MeshRasterizer, RadianceField, load_mesh
        from .scenes.mesh_files import UP

    if options.scene.suffix.lower() not in (*UP, ".ckpt"):
        raise ValueError(f"{options.scene} is no scene: name a mesh ({', '.join(UP)}) or the .ckpt of a fitted field")
    if options.size < 16:
        raise ValueError(f"size={options.size} must be at least 16 pixels")
    size = (options.size, options.size)
    if options.scene.suffix.lower() in UP:
        renderer = MeshRasterizer(load_mesh(options.scene), size, supersampling=2)
    else:
        renderer = RadianceField.load(options.scene, image_size=size).to(options.device)
    how = {name: getattr(options, name) for name in ("elevation", "frames", "fps", "distance", "device")}
    print(write_turntable(renderer, options.output, **how))
