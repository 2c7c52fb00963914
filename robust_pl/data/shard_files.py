"""Shards: many pictures in one file, in WebDataset's format, with an index that says where each of them lies.

A part of a set, ``train`` or ``val``, is ``train-000000.tar``, ``train-000001.tar``, ... and ``train.npz``, side by side. The
archives are plain ones of ``<number>.jpg`` and ``<number>.cls``, which WebDataset and ``tar`` read, too. The index makes any
sample readable by itself, so that this library's own order, resuming and augmentation are those of every other set.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .decode import UNREADABLE, decode, visible_part
from .images import Images

SCHEMES = ("https://", "http://", "gs://", "hf://")
REMEDY = "write it with python -m robust_pl.data.write_shards"


@dataclass
class ShardIndex:
    """Where the N samples of S shards lie.

    Args:
        classes: names of the classes.
        shards: names of the files.
        lengths: of the files in bytes, int64 (S,).
        first: position of each file's first sample, int64 (S,).
        offsets: of each sample in its file, int64 (N,).
        sizes: of each sample in bytes, int64 (N,).
        labels: int64 (N,).
    """

    classes: np.ndarray
    shards: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls, root: Path, part: str, url: str | None = None) -> ShardIndex:
        """The index of a part, fetched where it is missing and there is an address.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, is that of another part, or cannot be fetched.
        """
        path = root / f"{part}.npz"
        if url is not None:
            fetch(url, path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: set data_dir or ROBUST_PL_DATA to a folder of shards, or {REMEDY}")
        try:
            with np.load(path, allow_pickle=False) as file:
                index = cls(**{field.name: file[field.name] for field in fields(cls)})
            index.check(part)
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise ValueError(f"{path} is no index of shards, or damaged ({error}): {REMEDY}") from error
        return index

    def check(self, part: str) -> None:
        """Refuse what no writer wrote, since a wrong place or label would be found late or never.

        Raises:
            ValueError: naming what is wrong.
        """
        if any(names.ndim != 1 or names.dtype.kind != "U" for names in (self.classes, self.shards)):
            raise ValueError("classes and shards must be names")
        if bad := [name for name in self.shards.tolist() if Path(name).name != name]:
            raise ValueError(f"{bad[0]!r} is no name of a file in the same folder")
        if bad := [name for name in self.shards.tolist() if not name.startswith(f"{part}-")]:
            raise ValueError(f"{bad[0]} is no shard of the part {part}")
        of_shards, of_samples = (self.lengths, self.first), (self.labels, self.offsets, self.sizes)
        for columns, shape in ((of_shards, self.shards.shape), (of_samples, self.labels.shape[:1])):
            if any(column.shape != shape or column.dtype.kind != "i" for column in columns):
                raise ValueError("its columns are of unlike lengths, or no whole numbers")
        if not len(self.labels) or self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(f"it has no samples, or labels outside of its {len(self.classes)} classes")
        counts = np.diff(self.first, append=len(self.labels))
        if self.first[0] != 0 or counts.min() < 0:
            raise ValueError("its shards do not follow each other")
        ends = self.offsets + self.sizes
        if self.offsets.min() < 0 or self.sizes.min() < 0 or (ends > self.lengths.repeat(counts)).any():
            raise ValueError("a sample lies outside of its shard")

    def save(self, path: Path) -> None:
        """Write it, all of it or nothing, so that what was killed before can be told from what is whole."""
        unfinished = path.with_name(f".{path.name}.part")
        with unfinished.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        unfinished.replace(path)


class ShardedImages(Images):
    """Pictures in shards, cut and augmented as :class:`robust_pl.data.image_files.ImageFiles` does.

    Args:
        root: folder of the shards.
        part: ``train`` or ``val``.
        image_size: height and width of what is read.
        resize: length of the shorter side before the cut.
        url: where shards that the folder lacks are fetched from when one of their samples is first read; None means that all
            are there.

    Raises:
        FileNotFoundError: if the index or a shard is missing.
        ImportError: if a shard is to be fetched and WebDataset is not installed.
        ValueError: if one is damaged, or cannot be fetched.
    """

    def __init__(self, root: Path, part: str, image_size: int, resize: int, url: str | None = None) -> None:
        self.root, self.url, self.image_size, self.resize = Path(root), url, image_size, resize
        self.index = ShardIndex.load(self.root, part, url)
        self._look_at_shards()

    def _look_at_shards(self) -> None:
        """Find now what would end a run in the middle: shards that are missing, or were cut short as they were copied."""
        missing, names = [], self.index.shards.tolist()
        for name, length in zip(names, self.index.lengths.tolist(), strict=True):
            path = self.root / name
            if not path.is_file():
                missing.append(name)
            elif (size := path.stat().st_size) != length:
                remedy = "copy it anew" if self.url is None else "delete it, and it is fetched anew"
                raise ValueError(f"{path} has {size} bytes, not {length}: it was cut short, or is of another set; {remedy}")
        if missing and self.url is None:
            raise FileNotFoundError(
                f"{self.root} lacks {len(missing)} of {len(names)} shards, such as {missing[0]}: copy them all, or set url to "
                "where they can be fetched"
            )
        if missing:
            webdataset()

    def __len__(self) -> int:
        return len(self.index.labels)

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        index = self.index
        shard = int(np.searchsorted(index.first, position, side="right")) - 1
        path = self.root / str(index.shards[shard])
        if self.url is not None:
            fetch(self.url, path, int(index.lengths[shard]))
        with path.open("rb") as file:
            file.seek(index.offsets[position])
            content = file.read(index.sizes[position])
        try:
            image = decode(content)
        except UNREADABLE as error:
            raise ValueError(f"sample {position} in {path} cannot be read as an image ({error}): {REMEDY} anew") from error
        image = visible_part(image, self.resize, self.image_size, key)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(index.labels[position])


def fetch(url: str, path: Path, length: int | None = None) -> None:
    """Fetch a file that is missing; of several processes one does, and the others wait for it.

    Args:
        url: address of the folder that has a file of this name, by one of ``SCHEMES``. WebDataset's ``pipe:`` is none of them:
            it runs a command, which should not be in anybody's checkpoint.
        path: where it should be.
        length: in bytes, if known.

    Raises:
        ImportError: if WebDataset is not installed.
        ValueError: if it cannot be fetched.
    """
    if not url.startswith(SCHEMES):
        raise ValueError(
            f"url={url!r} is no address that shards can be fetched from: it must begin with {' or '.join(SCHEMES)}"
        )
    if path.is_file():
        return
    library = webdataset()
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    source, part = f"{url.rstrip('/')}/{path.name}", path.with_name(f".{path.name}.part")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        try:
            with library.gopen(source, "rb") as stream, part.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except OSError as error:
            part.unlink(missing_ok=True)
            code = re.search(r"exit \d+", str(error))  # the rest is how it was called
            said = f"{'gsutil' if url.startswith('gs:') else 'curl'}: {code[0]}" if code else error
            raise ValueError(f"{source} cannot be fetched ({said}): check url") from error
        if length is not None and (size := part.stat().st_size) != length:
            part.unlink()
            raise ValueError(f"{source} has {size} bytes, not {length}: it was cut short, or is of another set")
        part.replace(path)


def webdataset() -> ModuleType:
    """The library, imported when it is needed: to write shards and to fetch them.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import webdataset as library
    except ImportError as error:
        raise ImportError("shards are written and fetched by webdataset: pip install 'robust_pl[stream]'") from error
    return library
