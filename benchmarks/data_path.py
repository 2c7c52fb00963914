"""How fast batches come, in images per second: ``python -m benchmarks.data_path``.

Two sets, each read and augmented in every way that the library has. A small one, CIFAR-10 from ROBUST_PL_DATA or as many
random pixels: out of a copy on the device, in the process that trains, and by workers. And photographs of 500 x 375 pixels,
made here of smooth noise: as files, decoded by pillow and, where it is installed, torchvision, and in shards, if webdataset is
there to write them. Epochs of all ways are interleaved, wall time until the last batch is on the device as float32; the first
round starts workers and is not counted. Nothing is trained meanwhile: beside a training on few cores workers have less.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from robust_pl.data import CIFAR10DataModule, ImageFolderDataModule
from robust_pl.data import decode as decoding
from robust_pl.data.augment import crop_and_flip
from robust_pl.data.hashing import hash_keys
from robust_pl.data.images import Images, ImagesInMemory
from robust_pl.data.loaders import TrainLoader, TrainOrder
from robust_pl.data.resident import ResidentImages
from robust_pl.data.shard_files import ShardedImages
from robust_pl.data.shard_order import ShardOrder
from robust_pl.data.write_shards import shards_of_folders

from .timing import Rounds, machine, print_machine

WIDTH, HEIGHT, CLASSES = 500, 375, 4
AT_ONCE = 50


def small_set(count: int) -> tuple[ImagesInMemory, str]:
    """Images of 32 x 32 pixels in memory, and what they are."""
    if (Path(os.environ.get("ROBUST_PL_DATA", "data")) / CIFAR10DataModule.folder).is_dir():
        images = CIFAR10DataModule().load_train()
        return ImagesInMemory(images.images[:count], images.labels[:count], crop_and_flip), "CIFAR-10"
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImagesInMemory(pixels, torch.arange(count) % 10, crop_and_flip), "random pixels"


def write_photographs(root: Path, count: int) -> None:
    """``train/<class>/*.jpg``, about as large as ImageNet's are."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / "train" / str(i % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(256, size=(HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8))
        noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.jpg", quality=92)


def epoch_of(images: Images, batch: int, workers: int, device: torch.device, mixed: int = 16) -> Callable[[int], None]:
    """A function that reads the epoch of that number and has all of it on the device when it returns."""
    index = torch.arange(len(images))
    order: TrainOrder = TrainOrder(index, batch, 0, drop_last=False)
    if isinstance(images, ShardedImages):
        order = ShardOrder(index, torch.from_numpy(images.index.first), mixed, batch, 0, drop_last=False)
    loader = TrainLoader(images, order, num_workers=workers)
    loader.reader.device = device if device.type == "cuda" else None  # as in a run

    def read(epoch: int) -> None:
        order.set_epoch(epoch)
        for _ in loader:
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return read


def measure(what: str, sides: dict[str, Callable[..., object]], rounds: int) -> Rounds:
    """Wall seconds of an epoch in each way."""
    found = Rounds(what, rounds, sides)
    for turn, side in found.order():
        began = time.perf_counter()
        sides[side](turn)
        found.add(turn, side, time.perf_counter() - began)
    return found


def decoded_by(library: str, work: Callable[..., object]) -> Callable[..., object]:
    """The same, decoding as if torchvision were not installed, or with what is. Workers keep what they were started with."""

    def working(*arguments: int) -> None:
        with patch.object(decoding, "_torchvision", lambda: None) if library == "pillow" else nullcontext():
            work(*arguments)

    return working


def libraries() -> list[str]:
    """What can decode JPEG here."""
    return ["pillow", "torchvision"] if decoding._torchvision() is not None else ["pillow"]


def parts_of_the_work(content: bytes, rounds: int) -> Rounds:
    """CPU seconds of what is done with a photograph, ``AT_ONCE`` times each: a busy machine disturbs them less than rates."""
    keys, image = hash_keys(torch.arange(AT_ONCE)), decoding.decode(content)
    seen = torch.from_numpy(np.array(decoding.centre_part(image, 256, 224))).permute(2, 0, 1)
    batch = torch.stack(AT_ONCE * [seen])
    work: dict[str, Callable[..., object]] = {
        f"decode by {library}": decoded_by(library, lambda: [decoding.decode(content) for _ in keys]) for library in libraries()
    }
    work["cut a random part, resize it"] = lambda: [decoding.random_part(image, 224, key) for key in keys]
    work["8 bits to float32"] = lambda: batch.to(torch.float32).div_(255)
    found = Rounds("CPU milliseconds of a photograph", rounds, work)
    found.run(work)
    return found


def photograph_sides(root: Path, batch: int, workers: int, device: torch.device) -> dict[str, Callable[..., object]]:
    """Every way to read the photographs."""
    sides: dict[str, Callable[..., object]] = {}
    for library in libraries():
        for number in sorted({0, workers}):
            files = ImageFolderDataModule(str(root)).load_train()
            sides[f"files, {library}, {number} workers"] = decoded_by(library, epoch_of(files, batch, number, device))
    try:
        shards_of_folders(root, root / "shards", shard_mb=5)
    except ImportError as error:
        print(f"no shards: {error}")
        return sides
    for number in sorted({0, workers}):
        images = ShardedImages(root / "shards", "train", 224, 256)
        sides[f"shards, pillow, {number} workers"] = decoded_by("pillow", epoch_of(images, batch, number, device))
    return sides


def report(measured: dict[str, tuple[Rounds, int]], work: Rounds | None, device: torch.device) -> dict[str, object]:
    """Print a table a set and what the parts of the work cost, and return all figures."""
    figures: dict[str, object] = {"machine": machine(device)}
    console = Console()
    for name, (rounds, count) in measured.items():
        table = Table(title=f"{rounds.what}, to {device.type}")
        for column in ("path", "images/s", "min, max"):
            table.add_column(column, justify="left" if column == "path" else "right", no_wrap=True)
        sides = rounds.figures(rounds.sides[0])
        figures[name] = {"what": rounds.what, "images": count, "paths": sides}
        for side, found in sides.items():
            rates = [count / seconds for seconds in found["seconds"]]
            found["images_per_second"] = median(rates)
            table.add_row(side, f"{median(rates):,.0f}", f"{min(rates):,.0f}, {max(rates):,.0f}")
        console.print(table)
    if work is not None:
        milliseconds = {side: 1e3 * median(seconds) / AT_ONCE for side, seconds in work.seconds.items()}
        figures["photograph_cpu_ms"] = milliseconds
        console.print(f"{work.what}: " + ", ".join(f"{side} {ms:.3f}" for side, ms in milliseconds.items()), soft_wrap=True)
    print_machine(console, device)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where batches are to be, such as cuda")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved epochs of each way, beside the first")
    parser.add_argument("--images", type=int, default=10_000, help="of the small set")
    parser.add_argument("--photographs", type=int, default=256, help="0 leaves them out")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", "--out", dest="out", metavar="FILE", type=Path, help="JSON file for all figures")
    given = parser.parse_args()
    for name, least in (("rounds", 1), ("batch", 1), ("images", given.batch), ("photographs", 0), ("workers", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(given, name)}")
    device = torch.device(given.device)
    images, what = small_set(given.images)
    measured, work = {}, None
    sides: dict[str, Callable[..., object]] = {
        "copy on the device": epoch_of(ResidentImages([images], device), given.batch, 0, device)
    }
    sides |= {f"{n} workers": epoch_of(images, given.batch, n, device) for n in sorted({0, given.workers})}
    measured["small"] = measure(f"{len(images)} of {what}, 32 x 32", sides, given.rounds), len(images)
    if given.photographs:
        with tempfile.TemporaryDirectory() as root:
            write_photographs(Path(root), given.photographs)
            # Some batches for each worker, whatever the size of the set.
            batch = max(1, min(given.batch, given.photographs // (4 * max(given.workers, 1))))
            sides = photograph_sides(Path(root), batch, given.workers, device)
            name = f"{given.photographs} photographs, {WIDTH} x {HEIGHT}"
            measured["photographs"] = measure(name, sides, given.rounds), given.photographs
            work = parts_of_the_work(next(Path(root).glob("train/*/*")).read_bytes(), given.rounds)
    figures = report(measured, work, device)
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
