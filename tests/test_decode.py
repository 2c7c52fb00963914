"""Pictures are the same whoever decodes them."""

from __future__ import annotations

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import decode as decoding
from robust_pl.data.decode import UNREADABLE, decode
from robust_pl.data.hashing import hash_keys
from robust_pl.data.image_files import ImageFiles

PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)).resize((60, 50))


def content(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FILES = {
    "colours": content(PICTURE),
    "grey": content(PICTURE.convert("L")),
    "four colours": content(PICTURE.convert("CMYK")),
    "progressive": content(PICTURE, progressive=True, subsampling=0),
    "png": content(PICTURE, "PNG"),
}


def by_pillow(file: bytes) -> np.ndarray:
    with Image.open(BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


class Fake:
    """As torchvision decodes: channels first, as many as the file has, RuntimeError for what is damaged."""

    def __init__(self) -> None:
        self.asked = 0

    def decode_jpeg(self, data: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        try:
            with Image.open(BytesIO(data.numpy().tobytes())) as image:
                pixels = torch.from_numpy(np.array(image))
        except OSError as error:
            raise RuntimeError("damaged") from error
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


@pytest.mark.parametrize("library", ["none", "fake", "torchvision"])
@pytest.mark.parametrize("name", FILES)
def test_whoever_decodes_the_pixels_are_the_same(name, library, monkeypatch):
    fake = Fake()
    if library == "torchvision":
        pytest.importorskip("torchvision.io", exc_type=(ImportError, RuntimeError))
    else:
        monkeypatch.setattr(decoding, "_torchvision", lambda: fake if library == "fake" else None)
    image = decode(FILES[name])
    # Another release of libjpeg may round otherwise.
    difference = np.asarray(image).astype(int) - by_pillow(FILES[name])
    assert image.mode == "RGB" and np.abs(difference).max() <= (2 if library == "torchvision" else 0)
    assert fake.asked == (library == "fake" and name != "png")


@pytest.mark.parametrize("library", [None, Fake()])
@pytest.mark.parametrize("file", [FILES["colours"][:400], b"\xff\xd8no", b"", b"text"])
def test_damaged_files_are_refused_by_pillow(file, library, monkeypatch):
    monkeypatch.setattr(decoding, "_torchvision", lambda: library)
    with pytest.raises(UNREADABLE):
        decode(file)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_torchvision_that_cannot_be_imported_is_none(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr("sys.meta_path", [Broken()])
    for name in ("torchvision", "torchvision.io"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    assert decoding._torchvision.__wrapped__() is None


def test_crops_are_the_same_whoever_decodes(monkeypatch, tmp_path):
    (tmp_path / "a.jpg").write_bytes(FILES["colours"])
    images = ImageFiles(tmp_path, ["a.jpg"], torch.tensor([3]), 32, 40)
    read = []
    for library in (None, SimpleNamespace(decode_jpeg=Fake().decode_jpeg)):
        monkeypatch.setattr(decoding, "_torchvision", lambda library=library: library)
        read.append([images.sample(0, key)[0] for key in (None, hash_keys(1), hash_keys(2))])
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))
    assert read[0][0].shape == (3, 32, 32) and not torch.equal(read[0][1], read[0][2])
