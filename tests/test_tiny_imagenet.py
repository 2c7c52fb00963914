"""Tiny ImageNet in its original folders, on a small archive of the same layout; and the network of its protocol."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import TinyImageNetDataModule
from robust_pl.data.hashing import AUGMENT, hash_keys
from robust_pl.nets import PreActResNet18

from .test_data_files import _Quiet

REAL = Path(os.environ.get("ROBUST_PL_DATA", "/nonexistent"))
# Not sorted, as in the archive.
WNIDS = {"n03": "crane", "n01": "goldfish, Carassius auratus", "n02": "crane"}
VAL = ["n02", "n01", "n03", "n01", "n02"]


class Small(TinyImageNetDataModule):
    classes, train_images_a_class, test_images = 3, 4, 5


def colour(wnid: str, number: int) -> tuple[int, int, int]:
    return 20 * number, 80 * int(wnid[1:]), 200


def write(folder: Path, wnids: dict[str, str] = WNIDS) -> Path:
    """Images of one colour, which JPEG keeps but for rounding; the second of n01 is a greyscale one."""
    root = folder / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in {**wnids, "n99": "other"}.items()))
    for wnid in wnids:
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(4):
            path = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            Image.new("RGB", (64, 64), colour(wnid, i)).save(path, quality=95)
    Image.new("L", (64, 64), 77).save(root / "train" / "n01" / "images" / "n01_1.JPEG", quality=95)
    for i, wnid in enumerate(VAL):
        Image.new("RGB", (64, 64), colour(wnid, 5 + i)).save(root / "val" / "images" / f"val_{i}.JPEG", quality=95)
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(VAL)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def make(folder: Path, **settings: object) -> Small:
    return Small(str(folder), **{"batch_size": 3, "val_size": 0, **settings})


def test_training_images(tmp_path: Path) -> None:
    write(tmp_path)
    data = make(tmp_path, augment=False)
    assert (data.num_classes, data.in_channels, data.image_shape) == (3, 3, (3, 64, 64))
    assert data.class_names == ["goldfish", "crane (n02)", "crane (n03)"]
    assert data.train_set.images.dtype == torch.uint8 and data.train_set.images.shape == (12, 3, 64, 64)
    batches = list(data.train_dataloader())
    assert sorted(int(i) for _, _, index in batches for i in index) == list(range(12))
    for x, y, index in batches:
        assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32 and torch.equal(y, index // 4)
        for image, i in zip(x, index.tolist(), strict=True):
            expected = (77, 77, 77) if i == 1 else colour(f"n0{i // 4 + 1}", i % 4)
            assert (255 * image.mean((1, 2)) - torch.tensor(expected)).abs().max() < 3


def test_the_official_validation_set_is_the_test_set(tmp_path: Path) -> None:
    write(tmp_path)
    x, y, index = (torch.cat(parts) for parts in zip(*make(tmp_path).test_dataloader(), strict=True))
    assert index.tolist() == [0, 1, 2, 3, 4] and y.tolist() == [1, 0, 2, 0, 1]
    for i, wnid in enumerate(VAL):
        assert (255 * x[i].mean((1, 2)) - torch.tensor(colour(wnid, 5 + i))).abs().max() < 3


def test_validation_is_cut_from_training(tmp_path: Path) -> None:
    write(tmp_path)
    drawn = [make(tmp_path, val_size=4, seed=seed).split[1] for seed in (0, 1)]
    assert not torch.equal(*drawn) and all(len(part) == 4 for part in drawn)
    assert torch.equal(make(tmp_path, val_size=4, val_split="last").split[1], torch.arange(8, 12))


def test_augmentation_shifts_by_at_most_four_pixels_and_flips(tmp_path: Path) -> None:
    root = write(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "n01" / "images" / "n01_0.JPEG", quality=95)
    images = make(tmp_path).train_set
    assert torch.equal(images.read(torch.tensor([0]), None)[0], images.images[:1].float() / 255)
    original, seen = torch.nn.functional.pad(images.images[0], (4, 4, 4, 4)), set()
    for epoch in range(40):
        x = (255 * images.read(torch.tensor([0]), hash_keys(0, AUGMENT, epoch, torch.tensor([0])))[0][0]).round().byte()
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(x.flip(2) if flip else x, original[:, top : top + 64, left : left + 64])
        ]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) > 25 and {flip for *_, flip in seen} == {False, True}


def test_the_real_sizes() -> None:
    data = TinyImageNetDataModule
    assert (data.classes, data.train_images_a_class, data.test_images) == (200, 500, 10_000)
    assert TinyImageNetDataModule("/nowhere").num_classes == 200  # a network can be made before the files are there


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path) -> None:
    for stage in ("fit", "test"):
        with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200.wnids.txt does not exist: set .*--data.download true"):
            make(tmp_path).setup(stage)


@pytest.mark.parametrize(
    ("spoil", "stage", "error", "message"),
    [
        (
            lambda root: (root / "val" / "val_annotations.txt").unlink(),
            "test",
            FileNotFoundError,
            "val_annotations.txt does not",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\nval_1.JPEG\tn99\n"),
            "test",
            ValueError,
            r"val_annotations.txt, line 2: the class 'n99' of 'val_1.JPEG' is none of wnids.txt",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\n"),
            "test",
            ValueError,
            r"line 1: the class '' of 'val_0.JPEG'",
        ),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\n"),
            "test",
            ValueError,
            "is about 1 images, not 5",
        ),
        (
            lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(),
            "test",
            FileNotFoundError,
            r"val_3.JPEG does not exist",
        ),
        (
            lambda root: (root / "val" / "images" / "val_3.JPEG").write_bytes(b"no image"),
            "test",
            ValueError,
            r"val_3.JPEG cannot be read as an image",
        ),
        (lambda root: cut(root / "train" / "n02" / "images" / "n02_1.JPEG"), "fit", ValueError, r"n02_1.JPEG cannot be read"),
        (
            lambda root: Image.new("RGB", (32, 64)).save(root / "train" / "n02" / "images" / "n02_1.JPEG"),
            "fit",
            ValueError,
            r"n02_1.JPEG is an image of 32 x 64 pixels, not 64 x 64",
        ),
        (
            lambda root: (root / "train" / "n02" / "images" / "n02_1.JPEG").unlink(),
            "fit",
            ValueError,
            r"n02.images holds 3 JPEG images, not 4",
        ),
        (
            lambda root: (root / "train").rename(root / "gone"),
            "fit",
            FileNotFoundError,
            r"n01.images holds 0 JPEG images, not 4",
        ),
        (lambda root: (root / "wnids.txt").write_text("n01\nn02\n"), "fit", ValueError, "wnids.txt names 2 classes, not 3"),
        (lambda root: (root / "wnids.txt").write_bytes(b"\xff\xfe\x00"), "fit", ValueError, "wnids.txt is damaged"),
    ],
)
def test_bad_files(tmp_path: Path, spoil: Callable[[Path], object], stage: str, error: type[Exception], message: str) -> None:
    spoil(write(tmp_path))
    with pytest.raises(error, match=message):
        make(tmp_path).setup(stage)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


# Download -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a small archive on this machine, and its checksum."""
    root = write(tmp_path / "site")
    with zipfile.ZipFile(tmp_path / "site" / "small.zip", "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, file.relative_to(root.parent))
        archive.writestr("../escaped", "")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "site")))
    threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True).start()
    checksum = hashlib.md5((tmp_path / "site" / "small.zip").read_bytes()).hexdigest()
    yield f"http://127.0.0.1:{httpd.server_port}/small.zip", checksum
    httpd.shutdown()
    httpd.server_close()


def test_download_only_where_asked(tmp_path: Path, server: tuple[str, str]) -> None:
    target = tmp_path / "target"
    for download in (False, True):
        data = make(target, download=download)
        data.url, data.md5 = server
        data.prepare_data()
        assert target.exists() == download
    data.setup("fit")
    data.setup("test")
    assert len(data.train_set) == 12 and [path.name for path in target.iterdir()] == [data.folder]
    assert not (tmp_path / "escaped").exists()
    data.url = "http://127.0.0.1:9/gone"  # nothing is fetched again
    data.prepare_data()
    # A part that is missing is fetched with the rest.
    (target / data.folder / "words.txt").unlink()
    data.url = server[0]
    data.prepare_data()
    assert data.class_names[0] == "goldfish"


def test_a_damaged_archive_leaves_nothing(tmp_path: Path, server: tuple[str, str]) -> None:
    path = tmp_path / "site" / "small.zip"
    content = bytearray(path.read_bytes())
    content[600:700] = bytes(100)
    path.write_bytes(content)
    for checksum, message in ((server[1], "has the MD5 checksum"), (hashlib.md5(content).hexdigest(), "could not be unpacked")):
        data = make(tmp_path / "target", download=True)
        data.url, data.md5 = server[0], checksum
        with pytest.raises(ValueError, match=message):
            data.prepare_data()
        assert list((tmp_path / "target").iterdir()) == []


# The network ----------------------------------------------------------------------------------------------------------


def test_the_network_of_the_protocol() -> None:
    """PreActResNet-18 without a last BatchNorm and ReLU, on 64 x 64 images of 200 classes, pooled over 8 x 8."""
    net = PreActResNet18(num_classes=200, variant="wong2020").eval()
    # 11,171,146 for 10 classes, and 513 for each further one.
    assert sum(p.numel() for p in net.parameters()) == 11_171_146 + 190 * 513
    seen: list[torch.Tensor] = []
    net.layer4.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = net(x)
        assert seen[0].shape == (2, 512, 8, 8) and logits.shape == (2, 200)
        pooled = torch.nn.functional.avg_pool2d(seen[0], 8).flatten(1)
        torch.testing.assert_close(logits, net.linear(pooled))
        assert seen[0].min() < 0, "nothing is cut off before the pooling"


@pytest.mark.slow
def test_on_the_command_line(robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TinyImageNetDataModule, "classes", 3)
    monkeypatch.setattr(TinyImageNetDataModule, "train_images_a_class", 4)
    monkeypatch.setattr(TinyImageNetDataModule, "test_images", 5)
    config = """
model: {class_path: NFGSM, init_args: {net: {class_path: PreActResNet18, init_args: {variant: wong2020}}}}
data: {class_path: TinyImageNetDataModule, init_args: {batch_size: 2, val_size: 2}}
trainer: {max_epochs: 1, logger: false, limit_train_batches: 2, enable_progress_bar: false}
attacks: {fgsm: {class_path: FGSM}}
"""
    (tmp_path / "tiny.yaml").write_text(config)
    robust_pl("fit", "-c", "tiny.yaml", "--data.init_args.data_dir", root.parent)
    saved = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"]["net.linear.weight"].shape == (3, 512)


@pytest.mark.skipif(not (REAL / "tiny-imagenet-200").is_dir(), reason="needs ROBUST_PL_DATA")
def test_real_tiny_imagenet() -> None:
    data = TinyImageNetDataModule()
    assert data.class_names[:2] == ["goldfish", "European fire salamander"]
    assert torch.bincount(data.test_set.labels).tolist() == [50] * 200
