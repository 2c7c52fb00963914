"""Folders and lists of objects, ImageNet-V, and the folder of extreme views."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import ExtremeViewsDataModule, ImageNetVDataModule, MultiViewDataModule
from robust_pl.functional.viewpoints import camera_to_world

SIZE = 12
PLAIN = {"image_size": SIZE, "num_workers": 0, "batch_size": 4, "augment": False}


def picture(path: Path, grey: int = 100, size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (grey, grey, grey) if mode == "RGB" else (grey, grey, grey, 0)).save(path)


def folders(root: Path, classes: tuple[str, ...] = ("chair", "mug"), objects: int = 4, views: int = 3) -> Path:
    """<class>/<object>/<view>.png; the grey value tells object and view."""
    for c, kind in enumerate(classes):
        for o in range(objects):
            for v in range(views):
                picture(root / kind / f"{o:02d}" / f"{v}.png", 100 * c + 10 * o + v)
    return root


def module(root: Path, **arguments) -> MultiViewDataModule:
    made = MultiViewDataModule(str(root), **{**PLAIN, **arguments})
    made.setup("fit")
    made.setup("test")
    return made


def ids(data: MultiViewDataModule) -> list[set[str]]:
    """Objects of training, validation and test."""
    table = data.train_metadata
    parts = [{table.object_ids[i] for i in table.object[part].tolist()} for part in data.split]
    return [*parts, set(data.test_metadata.object_ids)]


# Splits --------------------------------------------------------------------------------------------------------------


def test_split_by_object(tmp_path):
    data = module(folders(tmp_path, objects=10), val_objects=0.1, test_objects=2)
    assert data.class_names == ["chair", "mug"] and data.num_classes == 2
    train, val, test = ids(data)
    assert [len(train), len(val), len(test)] == [14, 2, 4] and len(train | val | test) == 20
    assert [len(part) for part in data.split] == [42, 6] and len(data.test_set) == 12
    for part in (train, val, test):
        assert len({name.split("/")[0] for name in part}) == 2
    # The grey value says which object and view an image is of.
    for images, table in ((data.train_set, data.train_metadata), (data.test_set, data.test_metadata)):
        x, y = images.read(torch.arange(len(images)), None)
        for i in range(len(images)):
            kind, number = table.object_ids[table.object[i]].split("/")
            view = int(Path(table.names[i]).stem)
            assert round(float(x[i, 0, 0, 0]) * 255) == 100 * (kind == "mug") + 10 * int(number) + view
            assert y[i] == (kind == "mug") == table.labels[i]


def test_test_objects_are_the_same_for_every_seed_and_validation_objects_are_not(tmp_path):
    root = folders(tmp_path, objects=10, views=1)
    first, again, other = (ids(module(root, seed=seed, val_objects=2)) for seed in (0, 0, 1))
    assert first == again and other[2] == first[2] and other[1] != first[1]
    assert other[0] | other[1] == first[0] | first[1]


def test_last_objects(tmp_path):
    train, val, test = ids(module(folders(tmp_path, views=1), held_out="last", val_objects=1, test_objects=1))
    assert test == {"chair/03", "mug/03"} and val == {"chair/02", "mug/02"}
    assert train == {"chair/00", "chair/01", "mug/00", "mug/01"}


def test_nothing_held_out_for_validation(tmp_path):
    data = module(folders(tmp_path), val_objects=0, test_objects=0.25)
    assert data.val_dataloader() == [] and len(data.split[0]) == 18


def test_batches(tmp_path):
    data = module(folders(tmp_path))
    x, y, index = next(iter(data.train_dataloader()))
    assert x.shape == (4, 3, SIZE, SIZE) and x.dtype == torch.float32 and torch.equal(y, data.train_metadata.labels[index])


# Layouts -------------------------------------------------------------------------------------------------------------


def test_im3d_has_frames_with_poses(tmp_path):
    poses = camera_to_world(torch.tensor([[0.0, 30.0 * i, 60.0, 4.0, 0.0, 0.0] for i in range(2)], dtype=torch.float64))
    for kind in ("bow", "garden_cart"):
        for number in ("01", "02"):
            folder = tmp_path / f"{kind}_{number}"
            frames = [{"file_path": f"./train/r_{i}", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
            for i in range(2):
                picture(folder / "train" / f"r_{i}.png", 10 * i)
            picture(folder / "train" / "r_0_depth_0001.png")  # which is no view
            (folder / "transforms_train.json").write_text(json.dumps({"camera_angle_x": 0.69, "frames": frames}))
    data = module(tmp_path, poses=True, held_out="last", val_objects=0, test_objects=1)
    assert data.class_names == ["bow", "garden_cart"] and data.test_metadata.object_ids == ["bow_02", "garden_cart_02"]
    table = data.train_metadata
    assert table.names == [f"{name}_01/train/r_{i}.png" for name in ("bow", "garden_cart") for i in range(2)]
    torch.testing.assert_close(table.pose, poses.float().repeat(2, 1, 1), rtol=0, atol=1e-6)
    assert table.captions is None and module(tmp_path, test_objects=1).train_metadata.pose is None


def test_miro_has_all_objects_of_a_class_in_one_folder(tmp_path):
    for kind in ("bus", "car"):
        for number in range(1, 4):
            for view in range(1, 3):
                picture(tmp_path / kind / f"{kind}_{number}_{view:03d}.png")
    data = module(tmp_path, held_out="last", val_objects=1, test_objects=1)
    assert data.class_names == ["bus", "car"]
    assert ids(data) == [{"bus_1", "car_1"}, {"bus_2", "car_2"}, {"bus_3", "car_3"}]


def test_objaverse_has_classes_in_a_file_and_cameras_beside_the_images(tmp_path):
    pose = camera_to_world(torch.tensor([10.0, 20.0, 50.0, 2.0, 0.1, 0.2], dtype=torch.float64))
    for name in ("54ca", "77bb", "90ff"):
        picture(tmp_path / name / "000.png")
        np.save(tmp_path / name / "000.npy", np.linalg.inv(pose.numpy())[:3])
    (tmp_path / "classes.csv").write_text("54ca,chair\n77bb, chair\n90ff,chair\n")
    data = module(tmp_path, classes="classes.csv", poses=True, val_objects=0, test_objects=1)
    assert data.class_names == ["chair"] and len(data.test_set) == 1
    torch.testing.assert_close(data.train_metadata.pose[0], pose.float(), rtol=0, atol=1e-6)


def test_mvimgnet_has_images_beside_masks(tmp_path):
    for number in range(2):
        picture(tmp_path / "7" / f"1a{number}" / "images" / "001.jpg")
        picture(tmp_path / "7" / f"1a{number}" / "masks" / "001.jpg.png")
    data = module(tmp_path, val_objects=0, test_objects=1)
    assert len(data.train_set) == len(data.test_set) == 1 and data.train_metadata.names[0].endswith("/images/001.jpg")


def mvcap(root: Path, objects: int = 4, views: int = 2) -> list[dict]:
    records = []
    for number in range(objects):
        for view in range(views):
            path = f"./views/uid{number}/{view:03d}.png"
            picture(root / path)
            caption = f"Chair {number} from side {view}."
            records.append({"path": path, "caption": caption, "obj_id": 3177 + number, "img_id": 10 * number + view})
    (root / "metadata.json").write_text(json.dumps(records))
    return records


def test_mvcap_gives_captions(tmp_path):
    mvcap(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({str(3177 + i): ("chair", "sofa")[i % 2] for i in range(4)}))
    data = module(tmp_path, metadata="metadata.json", classes="classes.json", held_out="last", val_objects=0, test_objects=1)
    assert data.class_names == ["chair", "sofa"]
    assert data.train_metadata.captions == [f"Chair {i} from side {v}." for i in (0, 1) for v in (0, 1)]
    assert data.test_metadata.object_ids == ["3179", "3180"] and data.test_metadata.labels.tolist() == [0, 0, 1, 1]
    alone = module(tmp_path, metadata="metadata.json", classes="objects", val_objects=0.25, test_objects=1)
    assert alone.num_classes == 4 and [len(part) for part in ids(alone)] == [2, 1, 1]


# Pixels --------------------------------------------------------------------------------------------------------------


def test_resized_and_cut_in_the_middle_and_at_random_for_training(tmp_path):
    root = tmp_path / "set"
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :, 0], wide[:, :, 1] = np.arange(16) * 10, np.arange(8)[:, None] * 10
    for name in ("a", "b"):
        (root / "box" / name).mkdir(parents=True)
        Image.fromarray(wide).save(root / "box" / name / "0.png")
    data = module(root, image_size=4, resize=8, val_objects=0, test_objects=1)
    centre = data.train_set.read(torch.tensor([0]), None)[0][0].mul(255).round()
    assert centre[0, 0].tolist() == [60, 70, 80, 90] and centre[1, :, 0].tolist() == [20, 30, 40, 50]
    seen = set()
    for key in range(60):
        x = data.train_set.read(torch.tensor([0]), torch.tensor([key * 7_919]))[0][0].mul(255).round()
        row = x[0, 0].tolist()
        assert row in ([row[0] + 10 * i for i in range(4)], [row[0] - 10 * i for i in range(4)])
        seen.add((min(row), int(x[1, 0, 0]), row[0] < row[1]))
    assert len(seen) > 30 and {turned for *_, turned in seen} == {True, False}
    assert {left for left, *_ in seen} >= {0, 110} and {top for _, top, _ in seen} == {0, 10, 20, 30}


def test_transparent_images_show_the_background(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "box" / name / "0.png", 0, mode="RGBA")
    for grey in (1.0, 0.4):
        data = module(tmp_path, val_objects=0, test_objects=1, background=grey)
        assert data.train_set.read(torch.tensor([0]), None)[0].unique().tolist() == pytest.approx([grey])


# Bad input -----------------------------------------------------------------------------------------------------------


def fails(error: type[Exception], message: str, root: Path, **arguments) -> None:
    with pytest.raises(error, match=message):
        module(root, **arguments)


def test_an_object_without_a_class(tmp_path):
    picture(tmp_path / "54ca" / "000.png")
    fails(ValueError, "the object '54ca' has no class: put it into a folder of its class, or give classes", tmp_path)
    (tmp_path / "classes.json").write_text('{"77bb": "chair"}')
    fails(ValueError, "the object '54ca' has no class: add it to the file of classes", tmp_path, classes="classes.json")
    mvcap(tmp_path)
    listed = {"metadata": "metadata.json", "classes": "classes.json"}
    fails(ValueError, "the object '3177' has no class: add it to the file of classes", tmp_path, **listed)
    fails(ValueError, "a list of metadata gives no classes: set classes to a file", tmp_path, metadata="metadata.json")


def test_listed_images_that_are_missing(tmp_path):
    mvcap(tmp_path)
    (tmp_path / "views" / "uid1" / "001.png").unlink()
    listed = {"metadata": "metadata.json", "classes": "objects", "val_objects": 0, "test_objects": 0.25}
    message = "1 of 6 images that are listed are not in .*, such as views/uid1/001.png: complete the folder"
    fails(FileNotFoundError, message, tmp_path, **{**listed, "held_out": "last"})
    data = module(tmp_path, **{**listed, "held_out": "last"}, skip_missing=True)
    assert len(data.train_metadata) + len(data.test_metadata) == 7


def test_frames_that_are_missing_or_lie_elsewhere(tmp_path):
    picture(tmp_path / "photos" / "a.png", 7)
    frames = [{"file_path": path, "transform_matrix": np.eye(4).tolist()} for path in ("../photos/a.png", "b.png")]
    for number in ("1", "2"):
        folder = tmp_path / "objects" / f"cow_{number}"
        folder.mkdir(parents=True)
        frames[0]["file_path"] = str(tmp_path / "photos" / "a.png") if number == "1" else "../../photos/a.png"
        (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.69, "frames": frames}))
    arguments = {"val_objects": 0, "test_objects": 1}
    fails(FileNotFoundError, "cow_1/transforms.json lists 2 frames and 1 of their pictures are missing", tmp_path / "objects",
          **arguments)  # fmt: skip
    data = module(tmp_path / "objects", **arguments, skip_missing=True)
    assert len(data.train_metadata) == 1 and data.train_set.read(torch.tensor([0]), None)[0].unique().mul(
        255
    ).tolist() == pytest.approx([7.0])


def test_poses_that_are_missing(tmp_path):
    message = "9 of 18 images have no pose, such as chair/.*png: add transforms.json or <view>.npy beside them, or set poses"
    root = folders(tmp_path)
    np.save(root / "chair" / "00" / "0.npy", np.zeros(3))
    fails(ValueError, "0.npy holds no camera", root, poses=True, held_out="last", val_objects=0, test_objects=0.25)
    for path in root.glob("mug/*/*.png"):
        np.save(path.with_suffix(".npy"), np.eye(4)[:3])
    (root / "chair" / "00" / "0.npy").unlink()
    fails(ValueError, message, root, poses=True, val_objects=0, test_objects=0.25)


def test_metadata_that_is_damaged(tmp_path):
    listed = {"metadata": "metadata.json", "classes": "objects"}
    fails(FileNotFoundError, "metadata.json does not exist", tmp_path, **listed)
    (tmp_path / "metadata.json").write_text("[{")
    fails(ValueError, "metadata.json is damaged", tmp_path, **listed)
    (tmp_path / "metadata.json").write_text('[{"path": "a.png", "caption": "A."}]')
    fails(ValueError, "record 0 of .*metadata.json lacks 'obj_id'", tmp_path, **listed)
    (tmp_path / "metadata.json").write_text('[{"path": "a.png", "obj_id": 1, "caption": "A."}, {"path": "b.png", "obj_id": 2}]')
    fails(ValueError, "record 1 of .*metadata.json has no caption and others have", tmp_path, **listed)


def test_folders_and_arguments(tmp_path):
    fails(FileNotFoundError, "does not exist or holds no images in folders of objects", tmp_path / "none")
    root = folders(tmp_path, objects=2)
    fails(ValueError, "class 'chair' has 2 objects, of which val_objects=1 and test_objects=1 leave none", root,
          val_objects=1, test_objects=1)  # fmt: skip
    fails(ValueError, "test_objects=0.2 leaves no object to test on", root)
    fails(ValueError, "val_objects=1.5 must be a fraction", root, val_objects=1.5)
    fails(ValueError, "image_size=12 must be at least 1 and at most resize=8", root, resize=8)
    fails(ValueError, "background=2 is a grey value", root, background=2)
    (root / "chair" / "00" / "0.png").write_text("no image")
    data = module(root, val_objects=0, test_objects=1, held_out="last")
    with pytest.raises(ValueError, match=r"chair/00/0.png cannot be read as an image"):
        data.train_set.read(torch.tensor([0]), None)


# ImageNet-V ----------------------------------------------------------------------------------------------------------


def imagenet_v(root: Path, **arguments) -> ImageNetVDataModule:
    data = ImageNetVDataModule(str(root), image_size=8, resize=10, num_workers=0, **arguments)
    data.setup("test")
    return data


def test_the_classes_of_imagenet():
    names = ImageNetVDataModule("none").class_names
    assert len(set(names)) == 1000 and names == sorted(names)
    known = {"n01440764": 0, "n02979186": 482, "n03394916": 566, "n07697537": 934, "n07742313": 948, "n15075141": 999}
    assert {name: names.index(name) for name in known} == known


def test_imagenet_v_by_wordnet_number_number_and_map(tmp_path):
    for folder in ("n07697537", "948"):
        picture(tmp_path / folder / "0.png", size=(20, 15))
    data = imagenet_v(tmp_path)
    assert data.num_classes == len(data.class_names) == 1000
    x, y, _ = next(iter(data.test_dataloader()))
    assert x.shape == (2, 3, 8, 8) and sorted(y.tolist()) == [934, 948]
    picture(tmp_path / "hotdog" / "views" / "1.png")
    (tmp_path / "map.txt").write_text("hotdog n07697537\nother 3\n")
    assert sorted(imagenet_v(tmp_path, label_map="map.txt").test_set.labels.tolist()) == [934, 934, 948]


def test_imagenet_v_with_one_number_a_line(tmp_path):
    for folder in ("apple", "burger"):
        picture(tmp_path / folder / "0.png")
    (tmp_path / "label_map.txt").write_text("948\n933\n")
    assert imagenet_v(tmp_path, label_map="label_map.txt").test_set.labels.tolist() == [948, 933]
    (tmp_path / "label_map.txt").write_text("948\n")
    with pytest.raises(ValueError, match="has 1 classes for 2 folders"):
        imagenet_v(tmp_path, label_map="label_map.txt")


def test_imagenet_v_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist or holds no images in class folders"):
        imagenet_v(tmp_path / "none")
    picture(tmp_path / "hotdog" / "0.png")
    with pytest.raises(ValueError, match=r"1 folders of .* are no class of ImageNet, such as 'hotdog': give label_map"):
        imagenet_v(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"label_map=map.txt does not exist"):
        imagenet_v(tmp_path, label_map="map.txt")
    (tmp_path / "map.txt").write_text("hotdog 1000\n")
    with pytest.raises(ValueError, match="has the line 'hotdog 1000'"):
        imagenet_v(tmp_path, label_map="map.txt")
    with pytest.raises(ValueError, match="nothing to train or validate on: use robust-pl test"):
        ImageNetVDataModule(str(tmp_path)).setup("fit")


def test_imagenet_v_skips_damaged_images_only_when_asked(tmp_path):
    for i, folder in enumerate(("934", "948", "949")):
        picture(tmp_path / folder / "0.png", grey=50 * i)
    (tmp_path / "948" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"948/0.png cannot be read as an image"):
        list(imagenet_v(tmp_path).test_dataloader())
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 images that cannot be read: .*948/0.png"):
        data = imagenet_v(tmp_path, skip_damaged=True)
    assert data.test_set.read(torch.arange(2), None)[1].tolist() == [934, 949]


# Extreme views -------------------------------------------------------------------------------------------------------


def extreme(root: Path, names: list[str] | None = None) -> Path:
    rows = [
        ("views/a/0.png", "sample", "mug_1", 2),
        ("views/a/1.png", "sample", "mug_1", 2),
        ("worst/a/0.png", "worst", "mug_1", 2),
    ]
    for place, (file, *_) in enumerate(rows):
        picture(root / file, 10 * place)
    with (root / "views.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "kind", "object", "label"), *rows])
    (root / "views.json").write_text(json.dumps({"class_names": names, "image_size": [SIZE, SIZE]}))
    return root


def test_extreme_views(tmp_path):
    data = ExtremeViewsDataModule(str(extreme(tmp_path, ["a", "b", "mug"])))
    data.setup("test")
    assert data.class_names == ["a", "b", "mug"] and data.image_shape == (3, SIZE, SIZE)
    x, y, _ = next(iter(data.test_dataloader()))
    assert y.tolist() == [2, 2] and x[:, 0, 0, 0].mul(255).round().tolist() == [0, 10]
    worst = ExtremeViewsDataModule(str(tmp_path), kind="worst")
    assert len(worst.test_set) == 1
    with pytest.raises(ValueError, match="nothing to train or validate on"):
        data.setup("fit")


def test_extreme_views_without_names(tmp_path):
    extreme(tmp_path)
    with pytest.raises(ValueError, match="names no classes: set num_classes"):
        _ = ExtremeViewsDataModule(str(tmp_path)).class_names
    assert ExtremeViewsDataModule(str(tmp_path), num_classes=5).num_classes == 5
    with pytest.raises(ValueError, match="has the label 2: num_classes=2 must be above it"):
        _ = ExtremeViewsDataModule(str(tmp_path), num_classes=2).class_names
