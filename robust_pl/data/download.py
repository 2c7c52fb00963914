"""Fetching an archive: checked before anything is unpacked, and nothing half-written stays behind."""

from __future__ import annotations

import hashlib
import http.client
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from rich.progress import wrap_file

_TIMEOUT = 30.0
_BLOCK = 1 << 20


def download_and_extract(url: str, md5: str, folder: Path, member: str) -> None:
    """Download a tar or zip archive and move the files of its top folder ``member`` to ``folder / member``.

    Raises:
        ConnectionError: if the address cannot be reached or the transfer stops.
        ValueError: if the archive has another MD5 checksum, is damaged, or holds no ``member``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        archive, extracted = Path(temporary) / "archive", Path(temporary) / "extracted"
        digest = _download(url, archive)
        if digest != md5:
            raise ValueError(f"{url} has the MD5 checksum {digest}, not {md5}: nothing was kept; try again later")
        try:
            _extract(archive, extracted)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{url} could not be unpacked: {error}") from error
        files = [file for file in (extracted / member).rglob("*") if file.is_file()]
        if not files:
            raise ValueError(f"{url} holds no folder {member}")
        if not (folder / member).exists():
            with suppress(OSError):  # another node may have been faster
                (extracted / member).replace(folder / member)
                return
        for file in files:
            target = folder / file.relative_to(extracted)
            target.parent.mkdir(parents=True, exist_ok=True)
            # One file appears whole or not at all, also where another node shares the folder.
            file.replace(target)


def _extract(archive: Path, target: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(target)  # which lets no member climb out
        return
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, filter="data")
            return
        for member in tar:  # Python before 3.10.12 and 3.11.4, such as Debian 12's
            inside = (target / member.name).resolve().is_relative_to(target.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise tarfile.TarError(f"{member.name} is no file or folder inside of the archive's")
        tar.extractall(target)


def _download(url: str, target: Path) -> str:
    """Write the file and return its MD5 checksum."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, target.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with wrap_file(response, size, description=f"Downloading {url.rsplit('/', 1)[-1]}") as reader:
                while block := reader.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
            received = file.tell()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} could not be downloaded ({getattr(error, 'reason', error)}): fetch and unpack it elsewhere and set"
            " data_dir or ROBUST_PL_DATA"
        ) from error
    if received < size:
        raise ConnectionError(f"{url} sent {received} of {size} bytes: try again")
    return digest.hexdigest()
