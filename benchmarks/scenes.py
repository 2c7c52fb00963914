"""Frames a second of the renderers on one mesh: ``python -m benchmarks.scenes``.

CPU seconds (of all threads, ``time.process_time``) that a batch of poses takes, divided by the poses: best and median of
several rounds, in which all renderers take turns. mitsuba and pyrender are measured where they are installed. The mesh is a
sphere of 5,120 faces with colours at its vertices, seen from distance 4 with a field of view of 39.6 degrees, unless a file is
given.

Requirement, one thread: the rasteriser under 40 ms a frame at 224 pixels without supersampling; the field, that of a ball on a
grid of 64 cubed with 32 samples a ray, under 50 ms at 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import trimesh
from rich.console import Console
from rich.table import Table
from torch import Tensor

from robust_pl.scenes import (
    Mesh,
    MeshRasterizer,
    MitsubaRenderer,
    PyrenderRenderer,
    RadianceField,
    Renderer,
    ViewSpace,
    load_mesh,
)

from .timing import machine

FOV = 39.6
GRID, SAMPLES = 64, 32
FIELD = f"field, {GRID} cubed, {SAMPLES} samples"
LIMITS = {("rasterizer", 224): 40.0, (FIELD, 64): 50.0}
"""CPU milliseconds a frame at which a renderer may arrive, by name and size."""

Build = Callable[[int], Renderer]


def contenders(mesh: Mesh, field: Path | None = None) -> dict[str, Build]:
    """What is measured: by name, how a renderer of square images is made."""
    fitted = {} if field is None else {field.stem: lambda size: RadianceField.load(field, image_size=(size, size))}
    return {
        "rasterizer": lambda size: MeshRasterizer(mesh, (size, size), FOV),
        "rasterizer, 2 x 2 samples": lambda size: MeshRasterizer(mesh, (size, size), FOV, supersampling=2),
        "pyrender": lambda size: PyrenderRenderer(mesh, (size, size), FOV),
        "mitsuba, direct, 4 paths": lambda size: MitsubaRenderer(mesh, (size, size), FOV, samples=4, bounces=1),
        FIELD: ball,
        **fitted,
    }


def ball(size: int) -> RadianceField:
    """The field of a ball of radius 1, sharp to a cell, whose colours are places."""
    field = RadianceField((size, size), FOV, resolution=GRID, low=(-1.1,) * 3, high=(1.1,) * 3, samples=SAMPLES)
    axis = torch.linspace(-1.1, 1.1, GRID)
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    field.density.data[0, 0] = ((1 - place.norm(dim=0)) / (axis[1] - axis[0]) * 4).clamp(-12, 6)
    field.color.data[0] = 2 * place.flip(0)  # stored by z, y and x
    return field.requires_grad_(False)


def sphere(subdivisions: int) -> Mesh:
    """Twenty faces, each divided into four so often; colours are places."""
    shape = trimesh.creation.icosphere(subdivisions=subdivisions)
    vertices = torch.from_numpy(np.array(shape.vertices))
    return Mesh(vertices, torch.from_numpy(np.array(shape.faces)), colors=(vertices + 1) / 2, normals=vertices)


def measure(
    builds: dict[str, Build], size: int, poses: Tensor, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row a renderer; what cannot be made is left out, with a word."""
    renderers: dict[str, Renderer] = {}
    for name, build in builds.items():
        try:
            renderers[name] = build(size)
            renderers[name].render(poses)  # warm-up
        except (ImportError, OSError) as error:
            say(f"{name} is left out: {error}")
    taken: dict[str, list[float]] = {name: [] for name in renderers}
    for _ in range(rounds):
        for name, renderer in renderers.items():
            began = time.process_time()
            renderer.render(poses)
            taken[name].append(1000 * (time.process_time() - began) / len(poses))
    return [
        {
            "renderer": name,
            "size": size,
            "cpu_ms_best": min(times),
            "cpu_ms_median": median(times),
            "frames_per_cpu_second": 1000 / median(times),
            "cpu_ms": times,
            "limit_ms": LIMITS.get((name, size)),
        }
        for name, times in taken.items()
    ]


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """One row a renderer and size; frames a second of CPU time."""
    table = Table(title=title)
    for name in ("CPU ms a frame", "pixels", "best", "median", "frames/s", "at most"):
        table.add_column(name, justify="left" if name == "CPU ms a frame" else "right", no_wrap=True)
    for row in rows:
        limit = "" if row["limit_ms"] is None else f"{row['limit_ms']:g}"
        figures = (f"{row[key]:.2f}" for key in ("cpu_ms_best", "cpu_ms_median"))
        table.add_row(row["renderer"], str(row["size"]), *figures, f"{row['frames_per_cpu_second']:.0f}", limit)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False, soft_wrap=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenes", description="Frames a second of the renderers.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 112, 224], metavar="PIXELS")
    parser.add_argument("--poses", type=int, default=16, help="poses in a batch")
    parser.add_argument("--rounds", type=int, default=7, help="measured batches, after one for warming up")
    parser.add_argument("--threads", type=int, default=1, help="of torch; pyrender and mitsuba take what they like")
    parser.add_argument("--subdivisions", type=int, default=4, help="of the sphere: 20 * 4^n faces")
    parser.add_argument("--mesh", type=Path, metavar="FILE", help="an OBJ, PLY or glTF file instead of the sphere")
    parser.add_argument("--field", type=Path, metavar="FILE", help="measure the field of this checkpoint, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    for name, value in (*((key, vars(args)[key]) for key in ("poses", "rounds", "threads")), ("sizes", min(args.sizes))):
        if value < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    mesh = load_mesh(args.mesh) if args.mesh else sphere(args.subdivisions)
    space = ViewSpace(active="angles")
    poses = space.to_matrix(space.uniform(torch.rand(args.poses, space.dim, generator=torch.Generator().manual_seed(0))))
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        said.add(line)

    rows = [row for size in args.sizes for row in measure(contenders(mesh, args.field), size, poses, args.rounds, say)]
    print_table(rows, f"{len(mesh.faces):,} faces, batches of {args.poses} poses, {args.rounds} rounds", console)
    if args.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "json"}
        report = {"settings": settings, "machine": machine(), "faces": len(mesh.faces), "skipped": sorted(said), "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
