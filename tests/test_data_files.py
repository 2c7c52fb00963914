"""CIFAR batches, the pickle reader, the download and image folders."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import CIFAR10DataModule, CIFAR100DataModule, ImageFolderDataModule
from robust_pl.data.decode import random_box
from robust_pl.data.hashing import hash_keys
from robust_pl.data.safe_pickle import load_arrays

REAL = Path(os.environ.get("ROBUST_PL_DATA", "/nonexistent"))


class Small10(CIFAR10DataModule):
    train_files = (("data_batch_1", 20), ("data_batch_2", 20))
    test_files = (("test_batch", 10),)


class Small100(CIFAR100DataModule):
    train_files = (("train", 40),)
    test_files = (("test", 10),)


def write(data: CIFAR10DataModule, protocol: int = 2) -> dict[str, np.ndarray]:
    """Write random batches in the layout of the original files."""
    folder, rng, pixels = data.data_dir / data.folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (*data.train_files, *data.test_files):
        pixels[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {b"data": pixels[name], data.label_key: [i % data.num_classes for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return pixels


# CIFAR ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("cls", [Small10, Small100])
def test_cifar_batches(tmp_path, cls, protocol):
    data = cls(str(tmp_path), batch_size=4, eval_batch_size=5, augment=False, val_size=0)
    pixels = write(data, protocol)
    train = np.concatenate([pixels[name] for name, _ in data.train_files])
    x, y, index = next(iter(data.train_dataloader()))
    assert x.shape == (4, 3, 32, 32) and data.in_channels == 3
    assert np.array_equal(x.numpy(), train[index].reshape(4, 3, 32, 32).astype(np.float32) / np.float32(255))
    count = data.train_files[0][1]
    assert y.tolist() == [int(i) % count % data.num_classes for i in index]
    x, y, index = list(data.test_dataloader())[1]
    assert index.tolist() == y.tolist() == [5, 6, 7, 8, 9]


def test_cifar_names():
    assert len(CIFAR10DataModule().class_names) == 10
    assert len(set(CIFAR100DataModule.class_names)) == 100 and CIFAR100DataModule().num_classes == 100
    assert CIFAR100DataModule.class_names == sorted(CIFAR100DataModule.class_names)


def test_missing_cifar_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.data_batch_1 .*ROBUST_PL_DATA.*--data.download"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({b"data": c[b"data"][:-1]}), "does not hold 10 images"),
        (lambda c: c.update({b"data": c[b"data"].astype(np.int64)}), "does not hold 10 images"),
        (lambda c: c.pop(b"data"), "does not hold 10 images"),
        (lambda c: c.update({b"labels": [10] * 10}), "does not hold 10 labels from 0 to 9"),
        (lambda c: c.update({b"labels": [0] * 9}), "does not hold 10 labels"),
    ],
)
def test_damaged_cifar(tmp_path, change, message):
    data = Small10(str(tmp_path))
    write(data)
    path = tmp_path / data.folder / "test_batch"
    content = pickle.loads(path.read_bytes(), encoding="bytes")
    change(content)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"test_batch {message}"):
        data.setup("test")


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_cifar(tmp_path, keep):
    data = Small10(str(tmp_path))
    write(data)
    path = tmp_path / data.folder / "test_batch"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"test_batch is damaged .* fetch it again"):
        data.setup("test")


@pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="needs ROBUST_PL_DATA")
def test_real_cifar10():
    data = CIFAR10DataModule()
    data.setup("test")
    assert torch.bincount(data.test_set.labels).tolist() == [1000] * 10
    x, y, _ = next(iter(data.test_dataloader()))
    assert y[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, airplane, frog
    assert abs(float(x.mean()) - 0.475) < 0.02


# Pickles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "file"
    content = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], b"name": b"\xff"}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = load_arrays(path)
    assert np.array_equal(read[b"data"], content[b"data"])
    assert read[b"labels"] == [1, 2] and read[b"name"] == b"\xff"


def test_pickle_of_python_2(tmp_path):
    """The opcodes that Python 2 and its NumPy wrote: str becomes bytes, the array is rebuilt by its old name."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    (tmp_path / "py2").write_bytes(b"\x80\x02}(U\x04data" + array + dtype + b"\x89U\x06abcdeftbU\x06labels](K\x01K\x02eu.")
    read = load_arrays(tmp_path / "py2")
    assert read[b"labels"] == [1, 2] and read[b"data"].dtype == np.uint8
    assert read[b"data"].tolist() == [[97, 98, 99], [100, 101, 102]]


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "evil"
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps({b"data": Evil()}, protocol=protocol))
        with pytest.raises(ValueError, match=r"evil asks to import posix.system; refused"):
            load_arrays(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [b"builtins\neval", b"numpy\nload", b"numpy\nfromfile", b"_codecs\ndecode"])
def test_other_names_are_refused(tmp_path, name):
    path = tmp_path / "evil"
    path.write_bytes(b"c" + name + b"\n.")
    with pytest.raises(ValueError, match="refused"):
        load_arrays(path)
    path.write_bytes(b"cnumpy\nndarray.__class__\n.")
    with pytest.raises(ValueError, match="refused"):
        load_arrays(path)


# Download ------------------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """The address of a folder on this machine that holds a small archive, and that archive's checksum."""
    site = tmp_path / "site"
    source = Small10(str(site))
    write(source)
    with tarfile.open(site / "small.tar.gz", "w:gz") as tar:
        tar.add(site / source.folder, source.folder)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True).start()
    checksum = hashlib.md5((site / "small.tar.gz").read_bytes()).hexdigest()
    yield f"http://127.0.0.1:{httpd.server_port}/small.tar.gz", checksum
    httpd.shutdown()
    httpd.server_close()


def downloading(target: Path, url: str, md5: str) -> Small10:
    data = Small10(str(target), batch_size=4, download=True)
    data.url, data.md5 = url, md5
    return data


def test_download(tmp_path, server):
    target = tmp_path / "target"
    data = downloading(target, *server)
    data.prepare_data()
    data.setup("fit")
    assert [path.name for path in target.iterdir()] == [data.folder]
    assert len(data.train_set) == 40
    data.url = "http://127.0.0.1:9/gone"  # nothing is fetched again
    data.prepare_data()


def test_download_completes_a_folder(tmp_path, server):
    data = downloading(tmp_path / "target", *server)
    data.prepare_data()
    (tmp_path / "target" / data.folder / "test_batch").unlink()
    data.prepare_data()
    data.setup("test")


@pytest.mark.parametrize(
    ("url", "md5", "error", "message"),
    [
        (None, "0" * 32, ValueError, "MD5 checksum"),
        ("http://127.0.0.1:9/closed.tar.gz", None, ConnectionError, "could not be downloaded .*ROBUST_PL_DATA"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, server, url, md5, error, message):
    data = downloading(tmp_path / "target", url or server[0], md5 or server[1])
    with pytest.raises(error, match=message):
        data.prepare_data()
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("filtered", [True, False])
def test_archive_that_climbs_out_is_refused(tmp_path, server, monkeypatch, filtered):
    if not filtered:  # as Python 3.11.2 has it
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    site = tmp_path / "site"
    with tarfile.open(site / "evil.tar.gz", "w:gz") as tar:
        tar.add(site / "small.tar.gz", "../escaped")
    url = server[0].replace("small", "evil")
    data = downloading(tmp_path / "target", url, hashlib.md5((site / "evil.tar.gz").read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="could not be unpacked"):
        data.prepare_data()
    assert list((tmp_path / "target").iterdir()) == []


# Image folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes: 6 training images and 2 test images each, of one colour a class, one of them greyscale."""
    for part, count in (("train", 6), ("val", 2)):
        for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), colour).save(tmp_path / part / name / f"{i}.png")
    Image.new("L", (10, 50), 128).save(tmp_path / "val" / "cat" / "1.png")
    (tmp_path / "train" / "cat" / "readme.txt").write_text("not an image")
    return tmp_path


def make(folder: Path, **kwargs) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(folder), **{"batch_size": 4, "num_workers": 0, "image_size": 16, "resize": 20} | kwargs)


def test_image_folder(folder):
    data = make(folder, val_size=2)
    assert data.class_names == ["cat", "dog"] and (data.num_classes, data.in_channels) == (2, 3)
    assert data.image_shape == (3, 16, 16)
    assert len(data.split[0]) == 10 and len(data.split[1]) == 2
    x, y, index = next(iter(data.train_dataloader()))
    assert x.shape == (4, 3, 16, 16) and torch.equal(y, index // 6)
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1]])[y]
    assert torch.equal(x, colours[:, :, None, None].expand_as(x))
    x, y, index = next(iter(data.test_dataloader()))
    assert y.tolist() == [0, 0, 1, 1] and index.tolist() == [0, 1, 2, 3]
    assert x[1].unique().tolist() == [pytest.approx(128 / 255)]


def test_image_folder_centre_crop(tmp_path):
    """A 40 x 20 image at resize 20 is only cropped: columns 12 to 27, rows 2 to 17."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "0.png")
    x, _, _ = next(iter(make(tmp_path).test_dataloader()))
    assert np.array_equal((x[0] * 255).round().byte().permute(1, 2, 0).numpy(), pixels[2:18, 12:28])


def test_random_boxes():
    boxes = torch.tensor([random_box(100, 80, key) for key in hash_keys(torch.arange(500))]).double()
    left, top, width, height = boxes.unbind(1)
    assert left.min() >= 0 and top.min() >= 0 and (left + width).max() <= 100 and (top + height).max() <= 80
    area, aspect = width * height / 8000, width / height
    assert 0.07 < area.min() < 0.12 and area.max() > 0.85
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert abs(float(aspect.log().mean())) < 0.03
    assert random_box(1000, 10, hash_keys(0))[2] <= 14  # a strip: what fits, or the middle


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(folder, workers):
    path = folder / "val" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"^.*dog.0.png cannot be read as an image"):
        next(iter(make(folder, num_workers=workers).test_dataloader()))


def test_image_folder_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.train does not exist"):
        _ = make(folder / "nowhere").num_classes
    with pytest.raises(ValueError, match="image_size=32"):
        make(folder, image_size=32)
    (folder / "val" / "fox").mkdir()
    with pytest.raises(ValueError, match="classes that the training folder has not: fox"):
        make(folder).setup("test")
    (folder / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        make(folder / "empty").setup("fit")


@pytest.mark.skipif(not (REAL / "imagenette").is_dir(), reason="needs ROBUST_PL_DATA")
def test_real_imagenette():
    data = ImageFolderDataModule(str(REAL / "imagenette"), batch_size=8, eval_batch_size=8)
    assert data.num_classes == 10 and (len(data.train_set), len(data.test_set)) == (400, 200)
    x, _, _ = next(iter(data.train_dataloader()))
    assert x.shape == (8, 3, 224, 224)
    assert torch.equal(x, next(iter(data.train_dataloader()))[0])
    assert 0.2 < x.mean() < 0.7
