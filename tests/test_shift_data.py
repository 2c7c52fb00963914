"""Natural shifts of ImageNet and CIFAR-10 as test sets: labels, crops, and what is said where the files are not as they should
be.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import (
    CIFAR101DataModule,
    ImageFolderDataModule,
    ImageNetADataModule,
    ImageNetDataModule,
    ImageNetEDataModule,
    ImageNetRDataModule,
    ImageNetSketchDataModule,
    ImageNetSubsetDataModule,
    ImageNetV2DataModule,
    ObjectNetDataModule,
    StylizedImageNetDataModule,
)
from robust_pl.data.label_maps import classes_of, imagenet_wnids, sixteen_classes

REAL = Path(os.environ.get("ROBUST_PL_DATA", "/nonexistent")) / "imagenette"
WNIDS = imagenet_wnids()


def grey(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def folders(root: Path, names: list[str] | tuple[str, ...], size: tuple[int, int] = (8, 8)) -> None:
    """One image a folder, whose grey value is its place in the list modulo 251."""
    for place, name in enumerate(names):
        grey(root / name / "a.png", place % 251, size)


def read(data: ImageFolderDataModule | ImageNetSubsetDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey values and labels."""
    x, y = data.test_set.read(torch.arange(len(data.test_set)), None)
    assert x.shape[1:] == data.image_shape
    return (x.amax((1, 2, 3)) * 255).round().long(), y


SMALL = {"image_size": 4, "resize": 5, "num_workers": 0}


# Label maps -----------------------------------------------------------------------------------------------------------


def test_label_maps() -> None:
    assert len(WNIDS) == len(set(WNIDS)) == 1000 and list(WNIDS) == sorted(WNIDS)
    for name, some in (
        ("imagenet_a", [6, 11, 13, 15, 17]),
        ("imagenet_r", [1, 2, 4, 6, 8]),
    ):
        groups = list(classes_of(name).values())
        assert len(groups) == 200 and all(len(group) == 1 for group in groups)
        assert groups == sorted(groups) and [group[0] for group in groups[:5]] == some
    both = [{group[0] for group in classes_of(name).values()} for name in ("imagenet_a", "imagenet_r")]
    assert len(both[0] & both[1]) < 200
    objects = classes_of("objectnet")
    members = [number for group in objects.values() for number in group]
    assert (len(objects), len(members), len(set(members))) == (113, 125, 125)
    assert list(objects) == sorted(objects) and objects["chair"] == [423, 559, 765] and objects["banana"] == [954]
    sixteen = sixteen_classes()
    members = [number for group in sixteen.values() for number in group]
    assert len(sixteen) == 16 and list(sixteen) == sorted(sixteen) and len(members) == len(set(members)) == 207
    assert sixteen["airplane"] == [404] and sixteen["cat"] == list(range(281, 287)) and len(sixteen["dog"]) == 109


# Sets -----------------------------------------------------------------------------------------------------------------


def test_imagenet_needs_val_alone_to_test(tmp_path: Path) -> None:
    folders(tmp_path / "val", WNIDS)
    data = ImageNetDataModule(str(tmp_path), **SMALL)
    values, labels = read(data)
    assert labels.tolist() == list(range(1000)) and data.net_classes == data.num_classes == 1000
    assert values.tolist() == [i % 251 for i in range(1000)]
    (tmp_path / "val" / WNIDS[3] / "a.png").unlink()
    (tmp_path / "val" / WNIDS[3]).rmdir()
    with pytest.raises(ValueError, match=f"lacks 1 of the 1000 class folders of ImageNet, such as '{WNIDS[3]}'"):
        ImageNetDataModule(str(tmp_path), **SMALL).setup("test")
    with pytest.raises(FileNotFoundError, match=r"train does not exist or holds no class folders: put ImageNet's"):
        ImageNetDataModule(str(tmp_path), **SMALL).setup("fit")


def test_v2_counts_its_folders_as_numbers(tmp_path: Path) -> None:
    folders(tmp_path / "imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)])
    data = ImageNetV2DataModule(str(tmp_path), **SMALL)
    values, labels = read(data)
    assert labels.tolist() == list(range(1000)) and values.tolist() == [i % 251 for i in range(1000)]
    assert data.class_groups is None and data.net_classes == 1000
    folders(tmp_path / "imagenetv2-matched-frequency-format-val", ["1000", "banana"])
    with pytest.raises(ValueError, match="has 2 folders that are no classes of ImageNet-V2, such as '1000'"):
        ImageNetV2DataModule(str(tmp_path), **SMALL).setup("test")


@pytest.mark.parametrize(
    ("cls", "name", "usual"),
    [(ImageNetADataModule, "imagenet_a", "imagenet-a"), (ImageNetRDataModule, "imagenet_r", "imagenet-r")],
)
def test_a_and_r(tmp_path: Path, cls: type[ImageNetADataModule], name: str, usual: str) -> None:
    wnids = list(classes_of(name))
    folders(tmp_path / usual, wnids)
    data = cls(str(tmp_path), **SMALL)
    values, labels = read(data)
    assert labels.tolist() == values.tolist() == list(range(200))
    assert (data.num_classes, data.net_classes) == (200, 1000)
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.class_groups(logits), logits[:, [WNIDS.index(wnid) for wnid in wnids]])
    assert data.class_names == wnids
    # Directly named, too; and the one set is not taken for the other.
    assert len(cls(str(tmp_path / usual), **SMALL).test_set) == 200
    other = ImageNetRDataModule if cls is ImageNetADataModule else ImageNetADataModule
    with pytest.raises(ValueError, match=f"folders that are no classes of {other.title}, such as"):
        other(str(tmp_path / usual), **SMALL).setup("test")


@pytest.mark.parametrize("cls", [ImageNetSketchDataModule, StylizedImageNetDataModule])
def test_sketch_and_stylized(tmp_path: Path, cls: type[ImageNetSketchDataModule]) -> None:
    with pytest.raises(FileNotFoundError, match=f"ROBUST_PL_DATA to the folder of class folders of {cls.title}"):
        cls(str(tmp_path / "nothing")).setup("test")
    folders(tmp_path, [*WNIDS[:999], "n00000000"])
    with pytest.raises(ValueError, match=f"no classes of {cls.title}, such as 'n00000000'"):
        cls(str(tmp_path)).setup("test")
    (tmp_path / "n00000000").rename(tmp_path / WNIDS[999])
    assert read(cls(str(tmp_path), **SMALL))[1].tolist() == list(range(1000))
    with pytest.raises(ValueError, match="is a test set and nothing to train"):
        cls(str(tmp_path)).setup("fit")


def test_objectnet(tmp_path: Path) -> None:
    objects = classes_of("objectnet")
    folders(tmp_path / "objectnet-1.0" / "images", [*objects], size=(12, 12))
    grey(tmp_path / "objectnet-1.0" / "images" / "air_freshener" / "a.png", 9)  # which ImageNet has not
    bordered = Image.new("RGB", (14, 10), (255, 0, 0))
    bordered.paste(Image.new("RGB", (10, 6), (10, 200, 10)), (2, 2))
    bordered.save(tmp_path / "objectnet-1.0" / "images" / "chair" / "b.png")
    data = ObjectNetDataModule(str(tmp_path), **SMALL)
    assert len(data.test_set) == 114 and data.num_classes == 113
    x, y = data.test_set.read(torch.arange(114), None)
    chair = data.class_names.index("chair")
    place = y.tolist().index(chair) + 1
    assert y[place] == chair
    torch.testing.assert_close(x[place] * 255, torch.tensor([10.0, 200.0, 10.0]).view(3, 1, 1).expand(3, 4, 4))
    logits = torch.zeros(1, 1000)
    logits[0, 765] = 5  # rocking chair
    logits[0, 0] = 9  # a tench is none of the 113
    assert data.class_groups(logits).argmax().item() == chair
    grey(tmp_path / "objectnet-1.0" / "images" / "chair" / "c.png", 3, size=(4, 9))
    with pytest.raises(ValueError, match=r"c\.png is an image of 4 x 9 pixels, too small to cut off a border of 2"):
        read(ObjectNetDataModule(str(tmp_path), **SMALL))


def test_imagenet_e_may_lack_classes(tmp_path: Path) -> None:
    folders(tmp_path / "original", [WNIDS[7], WNIDS[3]])
    folders(tmp_path / "small", [WNIDS[3]])
    assert read(ImageNetEDataModule(str(tmp_path), "original", **SMALL))[1].tolist() == [3, 7]
    assert read(ImageNetEDataModule(str(tmp_path), "small", **SMALL))[1].tolist() == [3]
    with pytest.raises(FileNotFoundError, match=r"turned does not exist"):
        ImageNetEDataModule(str(tmp_path), "turned").setup("test")
    with pytest.raises(ValueError, match="2 folders that are no classes of ImageNet-E, such as 'original'"):
        ImageNetEDataModule(str(tmp_path)).setup("test")


def test_subset(tmp_path: Path) -> None:
    folders(tmp_path, [WNIDS[217], WNIDS[0]])
    data = ImageNetSubsetDataModule(str(tmp_path), **SMALL)
    assert data.class_names == [WNIDS[0], WNIDS[217]] and data.class_groups.groups == [[0], [217]]
    assert (data.num_classes, data.net_classes) == (2, 1000) and read(data)[1].tolist() == [0, 1]
    folders(tmp_path, ["tench"])
    with pytest.raises(ValueError, match=r"1 folders of .* are no classes of ImageNet, such as 'tench': name them by WordNet"):
        ImageNetSubsetDataModule(str(tmp_path), **SMALL).setup("test")


def test_validation_images_of_the_classes_of_another_set(tmp_path: Path) -> None:
    """What accuracy on ObjectNet is compared with: all 125 folders, in 113 classes."""
    objects = classes_of("objectnet")
    folders(tmp_path, WNIDS)
    data = ImageNetSubsetDataModule(str(tmp_path), "objectnet", **SMALL)
    _, y = read(data)
    assert len(y) == 125 and data.num_classes == 113 and set(y.tolist()) == set(range(113))
    assert (y == data.class_names.index("chair")).sum() == 3
    assert data.class_groups.groups == list(objects.values())
    assert len(ImageNetSubsetDataModule(str(tmp_path), "imagenet_r", **SMALL).test_set) == 200


# CIFAR-10.1 -----------------------------------------------------------------------------------------------------------


def test_cifar10_1(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(2000, dtype=np.int32) % 10
    folder = tmp_path / "cifar10.1"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"cifar10\.1_v6_data\.npy does not exist: put cifar10\.1_v6_data\.npy of the"):
        CIFAR101DataModule(str(tmp_path)).setup("test")
    np.save(folder / "cifar10.1_v6_data.npy", pixels)
    np.save(folder / "cifar10.1_v6_labels.npy", labels)
    data = CIFAR101DataModule(str(tmp_path))
    x, y = data.test_set.read(torch.tensor([5, 1999]), None)
    assert np.array_equal((x * 255).round().numpy().astype(np.uint8), pixels[[5, 1999]].transpose(0, 3, 1, 2))
    assert y.tolist() == [5, 9] and data.class_names[5] == "dog"
    np.save(folder / "cifar10.1_v6_labels.npy", labels + 1)
    with pytest.raises(ValueError, match="does not hold 2000 labels from 0 to 9"):
        CIFAR101DataModule(str(tmp_path)).setup("test")
    np.save(folder / "cifar10.1_v6_data.npy", pixels[:, :28, :28])
    with pytest.raises(ValueError, match=r"holds uint8 \(2000, 28, 28, 3\), not 2000 images uint8 \(32, 32, 3\)"):
        CIFAR101DataModule(str(tmp_path)).setup("test")
    with pytest.raises(ValueError, match="version='v5' is unknown: choose one of v4, v6"):
        CIFAR101DataModule(version="v5")


# Damaged images -------------------------------------------------------------------------------------------------------


def test_a_damaged_image_is_named_and_skipped_only_when_asked(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for place in range(5):
        path = tmp_path / WNIDS[place % 2] / f"{place}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    damaged = tmp_path / WNIDS[0] / "2.jpg"
    damaged.write_bytes(whole[: len(whole) // 2])  # its header is whole
    data = ImageNetSubsetDataModule(str(tmp_path), eval_batch_size=2, **SMALL)
    with pytest.raises(ValueError, match=r"2\.jpg cannot be read as an image .* set skip_damaged to true") as caught:
        list(data.test_dataloader())
    assert "\n" not in str(caught.value)
    data = ImageNetSubsetDataModule(str(tmp_path), eval_batch_size=2, skip_damaged=True, **SMALL)
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 images that cannot be read: .*2\.jpg"):
        data.setup("test")
    assert data.test_set.skipped == [damaged]
    labels = torch.cat([y for _, y, _ in data.test_dataloader()])
    assert labels.tolist() == [0, 0, 1, 1]
    for path in tmp_path.glob("*/*.jpg"):
        path.write_text("not an image")
    with pytest.raises(ValueError, match=r"none of the 5 images in .* can be read"):
        ImageNetSubsetDataModule(str(tmp_path), skip_damaged=True, **SMALL).setup("test")


def test_training_images_are_skipped_too(tmp_path: Path) -> None:
    for part in ("train", "val"):
        folders(tmp_path / part, ["a", "b", "c"])
    (tmp_path / "train" / "b" / "a.png").write_bytes(b"\x89PNG")
    data = ImageFolderDataModule(str(tmp_path), val_size=0, batch_size=2, skip_damaged=True, **SMALL)
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        data.setup("fit")
    assert data.train_set.labels.tolist() == [0, 2]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Imagenette's files")
def test_imagenette_files() -> None:
    data = ImageNetSubsetDataModule(str(REAL / "val"), num_workers=0)
    assert data.num_classes == 10 and len(data.test_set) == 200 and data.class_groups.groups[0] == [0]
    x, y = data.test_set.read(torch.tensor([0, 199]), None)
    assert x.shape == (2, 3, 224, 224) and 0 <= x.min() < x.max() <= 1 and y.tolist() == [0, 9]
