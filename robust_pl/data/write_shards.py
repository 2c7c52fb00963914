"""Write image folders into shards: ``python -m robust_pl.data.write_shards SRC DST``, see :mod:`robust_pl.data.shard_files`."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.progress import track

from .decode import UNREADABLE, decode
from .hashing import permutation
from .image_files import ImageFiles, labelled, subfolders
from .shard_files import ShardIndex, webdataset

_QUALITY = 95
_LAYOUT = "name a folder that holds train and val, with one folder a class in each"


def shards_of_folders(
    source: Path, target: Path, shard_mb: float = 100, resize: int | None = None, skip_damaged: bool = False, seed: int = 0
) -> list[Path]:
    """Write ``train/<class>/*`` and ``val/<class>/*``, or the one that there is, and return the paths of their indices.

    Training samples are shuffled, so that a few shards are a random sample of the set; others stay in the order of
    :class:`robust_pl.data.ImageFolderDataModule`. Files are taken over as they are, unless ``resize`` is given.

    Args:
        source: that holds the folders.
        target: folder of the shards.
        shard_mb: size of a shard in MB.
        resize: encode larger pictures anew, as JPEG of quality 95 with a shorter side of so many pixels, which makes them
            smaller and faster to decode, and changes pixels.
        skip_damaged: look at every file first and leave out what cannot be read.
        seed: of the shuffling.

    Raises:
        FileNotFoundError: if there are no pictures.
        ImportError: if WebDataset is not installed.
        ValueError: if there are shards already, a file that is to be made smaller is no picture, ``val`` has a class that
            ``train`` has not, or an argument is out of range.
    """
    if not shard_mb > 0:
        raise ValueError(f"shard_mb={shard_mb} must be above 0")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if resize is not None and resize < 1:
        raise ValueError(f"resize={resize} must be at least 1")
    parts = [part for part in ("train", "val") if (source / part).is_dir()]
    if not parts:
        raise FileNotFoundError(f"{source} holds neither train nor val: {_LAYOUT}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder for the shards")
    # Shards without an index are those of a writing that was killed: fewer new ones would leave some of them standing.
    if there := [path for part in parts for name in (f"{part}.npz", f"{part}-*.tar") for path in sorted(target.glob(name))]:
        raise ValueError(f"{there[0]} exists: name another folder, or delete the shards in it")
    classes = subfolders(source / parts[0], _LAYOUT)
    sets = {}
    for part in parts:
        if unknown := [name for name in subfolders(source / part, _LAYOUT) if name not in classes]:
            raise ValueError(f"{source / part} has classes that the training folder has not: {', '.join(unknown[:5])}")
        sets[part] = labelled(source / part, {name: label for label, name in enumerate(classes)})
    webdataset()
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for part, (names, labels) in sets.items():
        files = ImageFiles(source / part, names, labels, 1, 1, skip_damaged=skip_damaged)
        order = permutation(len(files), seed).tolist() if part == "train" else range(len(files))
        written.append(_write(files, order, classes, target, part, shard_mb, resize))
    return written


def _write(
    files: ImageFiles, order: Sequence[int], classes: list[str], target: Path, part: str, shard_mb: float, resize: int | None
) -> Path:
    shards: list[Path] = []
    pattern = str(target / part).replace("%", "%%") + "-%06d.tar"
    with webdataset().ShardWriter(
        pattern, maxsize=shard_mb * 1e6, verbose=0, encoder=False, mtime=0, post=lambda name: shards.append(Path(name))
    ) as writer:
        for place, position in enumerate(track(order, f"Writing {part}")):
            path = files.path(position)
            content, ending = path.read_bytes(), path.suffix[1:].lower()
            if resize is not None and (small := _smaller(content, resize, path)) is not None:
                content, ending = small, "jpg"
            writer.write({"__key__": f"{place:08d}", ending: content, "cls": str(int(files.labels[position])).encode()})
    found = [_samples(path) for path in shards]
    counts = np.array([len(offsets) for offsets, _ in found])
    offsets, sizes = (np.array([entry for one in column for entry in one], np.int64) for column in zip(*found, strict=True))
    ShardIndex(
        classes=np.array(classes),
        shards=np.array([path.name for path in shards]),
        lengths=np.array([path.stat().st_size for path in shards]),
        first=counts.cumsum() - counts,
        offsets=offsets,
        sizes=sizes,
        labels=files.labels[list(order)].numpy(),
    ).save(index := target / f"{part}.npz")
    return index


def _samples(path: Path) -> tuple[list[int], list[int]]:
    """Offsets and sizes of the pictures in a shard."""
    with tarfile.open(path) as archive:
        members = [member for member in archive if not member.name.endswith(".cls")]
    return [member.offset_data for member in members], [member.size for member in members]


def _smaller(content: bytes, resize: int, path: Path) -> bytes | None:
    """The picture with a shorter side of ``resize`` pixels; None where it is no longer than that."""
    try:
        image = decode(content)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it, or set skip_damaged") from error
    scale = resize / min(image.size)
    if scale >= 1:
        return None
    file = BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), 1).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m robust_pl.data.write_shards", description="Write image folders into shards.")
    parser.add_argument("source", type=Path, help="folder that holds train/<class>/* and val/<class>/*, or one of them")
    parser.add_argument("target", type=Path, help="folder of the shards")
    parser.add_argument("--shard_mb", type=float, default=100, help="size of a shard in MB")
    parser.add_argument("--resize", type=int, help="encode larger pictures anew with a shorter side of so many pixels")
    parser.add_argument("--skip_damaged", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling of the training samples")
    given = parser.parse_args(arguments)
    try:
        written = shards_of_folders(given.source, given.target, given.shard_mb, given.resize, given.skip_damaged, given.seed)
        indices = [ShardIndex.load(path.parent, path.stem) for path in written]
    except OSError as error:
        where = f"{error.filename} cannot be written or read ({error.strerror}): name another folder"
        parser.exit(2, f"{where if error.strerror else error}\n")
    except (ImportError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    for path, index in zip(written, indices, strict=True):
        print(f"{path}: {len(index.labels)} samples of {len(index.classes)} classes in {len(index.shards)} shards")


if __name__ == "__main__":
    main()
