"""Arrays in .npy and .npz files, mapped into memory: of a file of many gigabytes only what is asked for is read."""

from __future__ import annotations

import mmap
import secrets
import shutil
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

_LOCAL_HEADER = 30
_BLOCK = 1 << 20


@dataclass
class MappedArray:
    """An array inside a file. Workers get its place, not its content.

    Args:
        path: of the file.
        offset: of its first byte.
        shape: of the array.
        dtype: of the array.
        order: ``C`` or ``F``.
        identity: changes when the content does, as far as can be told without reading it.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    identity: str

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def array(self) -> np.ndarray:
        """All of it, for reading here and there."""
        return self._mapped(ahead=False)

    def read(self, index: np.ndarray | slice) -> np.ndarray:
        """A copy of some rows."""
        return np.array((self._mapped() if isinstance(index, slice) else self.array)[index])

    def _mapped(self, ahead: bool = True) -> np.ndarray:
        with self.path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not ahead and hasattr(mmap, "MADV_RANDOM"):
            # Else the system also reads what lies around each image: with 8 MiB of it, measured 700 times slower.
            content.madvise(mmap.MADV_RANDOM)
        return np.ndarray(self.shape, self.dtype, content, self.offset, order=self.order)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "array"}


def map_npy(path: Path) -> MappedArray:
    """The array of a .npy file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not one, holds objects, or is cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    status = path.stat()
    with path.open("rb") as file:
        return _header(file, path, f"{status.st_size:x}-{status.st_mtime_ns:x}")


def map_npz(path: Path, names: tuple[str, ...]) -> dict[str, MappedArray]:
    """Those of the named arrays that a .npz file holds.

    What was stored as it is, as ``numpy.savez`` does, is mapped in place. What was compressed is unpacked once, piece by piece,
    to a file beside it, whose name ends in the content's checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
        OSError: if it must be unpacked and cannot be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {name: _member(archive, members[name], path) for name in names if name in members}
    except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not an npz file ({error}): fetch or write it again") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> MappedArray:
    identity = f"{info.CRC:08x}-{info.file_size:x}"
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
        with path.open("rb") as file:
            file.seek(info.header_offset)
            # The central directory, which was read, may give other extra fields than the local header does.
            name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[-4:])
            file.seek(name + extra, 1)
            return _header(file, path, identity)
    target = path.with_name(f"{path.name}.{info.filename.removesuffix('.npy')}-{info.CRC:08x}.npy")
    if not target.is_file():
        with archive.open(info) as packed:
            write_whole(target, packed)
    with target.open("rb") as file:
        return _header(file, target, identity)


def write_whole(target: Path, content: Any) -> None:
    """Copy a stream to a file that appears whole or not at all, also where several processes write it."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(content, file, _BLOCK)
        part.replace(target)
    except PermissionError as error:
        raise PermissionError(f"{target} cannot be written ({error.strerror}): copy the data to your own folder") from error
    finally:
        part.unlink(missing_ok=True)


def _header(file: BinaryIO, path: Path, identity: str) -> MappedArray:
    """Read a .npy header where the file stands."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged or not a NumPy array ({error}): fetch or write it again") from error
    if dtype.hasobject:
        raise ValueError(f"{path} holds Python objects, which would run code when read: write it as an array of numbers")
    missing = file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize - path.stat().st_size
    if missing > 0:
        raise ValueError(f"{path} is cut short, {missing} bytes are missing: fetch or write it again")
    return MappedArray(path, file.tell(), shape, dtype, "F" if fortran else "C", identity)
