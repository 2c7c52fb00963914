"""Shards: the same samples as in folders, an order of their own, resuming, fetching, and the command that writes them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_pl.data import ImageFolderDataModule, ShardedImagesDataModule
from robust_pl.data.decode import decode
from robust_pl.data.hashing import AUGMENT, hash_keys
from robust_pl.data.shard_files import ShardedImages, ShardIndex
from robust_pl.data.shard_order import ShardOrder
from robust_pl.data.write_shards import main, shards_of_folders

from .test_data_resume import SaveAt, fit_module
from .test_resident import attach

TRAIN, SIZES = 60, {"image_size": 8, "resize": 10, "num_workers": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in three classes, as JPEG, some of them grey or PNG."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for part, count in (("train", TRAIN // 3), ("val", 3)):
        for name in ("ant", "bee", "cow"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(256, size=(14, 18, 3), dtype=np.uint8))
                image = image.convert("L") if i == 1 else image
                image.save(root / part / name / (f"{i:02d}.png" if i == 2 else f"{i:02d}.JPEG"))
    return root


@pytest.fixture(scope="module")
def shards(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("webdataset")
    target = tmp_path_factory.mktemp("100% shards")
    shards_of_folders(folders, target, shard_mb=0.004)
    return target


def make(shards: Path, **more) -> ShardedImagesDataModule:
    return ShardedImagesDataModule(str(shards), **SIZES | {"batch_size": 6, "mixed": 3} | more)


# What is in them -----------------------------------------------------------------------------------------------------


def test_the_test_set_is_that_of_the_folders(folders, shards):
    ours, theirs = make(shards), ImageFolderDataModule(str(folders), batch_size=6, **SIZES)
    assert ours.class_names == theirs.class_names == ["ant", "bee", "cow"] and ours.image_shape == (3, 8, 8)
    assert len(ours.test_set.index.shards) > 1
    for one, other in zip(ours.test_dataloader(), theirs.test_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_training_set_is_that_of_the_folders_in_another_order(folders, shards):
    ours, theirs = make(shards).train_set, ImageFolderDataModule(str(folders), **SIZES).train_set
    assert len(ours) == TRAIN and len(ours.index.shards) > 6
    (x, y), (x_folder, y_folder) = ours.read(torch.arange(TRAIN), None), theirs.read(torch.arange(TRAIN), None)
    place = (x.flatten(1).unsqueeze(1) == x_folder.flatten(1)).all(2).long().argmax(1)
    assert torch.equal(place.sort().values, torch.arange(TRAIN)) and torch.equal(y, y_folder[place])
    assert (place != torch.arange(TRAIN)).sum() > TRAIN / 2
    assert all(len(y[start : start + 20].unique()) == 3 for start in (0, 20, 40))  # no shard is of one class


def test_webdataset_reads_them(folders, shards):
    import webdataset

    index = ShardIndex.load(shards, "train")
    urls = [str(shards / name) for name in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [int(sample["cls"]) for sample in samples] == index.labels.tolist()
    content = [next(sample[kind] for kind in ("jpeg", "png") if kind in sample) for sample in samples]
    assert [len(one) for one in content] == index.sizes.tolist()
    assert sorted(content) == sorted(path.read_bytes() for path in (folders / "train").glob("*/*"))


def test_pictures_are_made_smaller_where_that_is_asked_for(folders, tmp_path):
    pytest.importorskip("webdataset")
    shards_of_folders(folders, tmp_path, resize=7)
    images = ShardedImages(tmp_path, "train", 4, 4)
    with (tmp_path / str(images.index.shards[0])).open("rb") as file:
        file.seek(images.index.offsets[5])
        assert decode(file.read(images.index.sizes[5])).size == (9, 7)
    assert len(images.index.shards) == 1


def test_damaged_files_are_left_out_where_that_is_asked_for(tmp_path):
    pytest.importorskip("webdataset")
    folder = tmp_path / "source/val/ant"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="skipped 1 of 3 images"):
        shards_of_folders(tmp_path / "source", tmp_path / "shards", skip_damaged=True)
    data = make(tmp_path / "shards")  # of a test set alone
    x, y, _ = next(iter(data.test_dataloader()))
    assert data.class_names == ["ant"] and y.tolist() == [0, 0]
    assert (x[:, 0].amax((1, 2)) * 255).tolist() == pytest.approx([0, 160])
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image .* or set skip_damaged"):
        shards_of_folders(tmp_path / "source", tmp_path / "more", resize=4)
    (folder / "1.png").write_bytes(b"")  # taken over as it is, like every other one
    main([str(tmp_path / "source"), str(tmp_path / "as they are")])
    with pytest.raises(ValueError, match=r"sample 1 in .* cannot be read as an image \(its 0 bytes"):
        list(make(tmp_path / "as they are").test_dataloader())


# Order ---------------------------------------------------------------------------------------------------------------


def test_an_order_mixes_few_shards_at_a_time():
    first, held_out = torch.tensor([0, 10, 25, 30, 47, 60]), torch.tensor([3, 26, 69])
    index = torch.tensor([i for i in range(70) if i not in held_out])
    order = ShardOrder(index, first, 2, 1, seed=5)
    epochs = [torch.cat(order.batches(epoch)) for epoch in range(40)]
    for positions in epochs:
        assert torch.equal(positions.sort().values, index)
        shards = torch.bucketize(positions, first, right=True) - 1
        groups, start = [], 0
        while start < len(index):  # two whole shards after two whole shards
            pair = shards[start:].unique_consecutive()[:1].tolist()
            pair += [s for s in shards[start:].tolist() if s != pair[0]][:1]
            count = int(torch.isin(shards, torch.tensor(pair)).sum())
            assert set(shards[start : start + count].tolist()) == set(pair)
            groups.append(tuple(sorted(pair)))
            start += count
        assert len(groups) == 3 and len({s for pair in groups for s in pair}) == 6
        assert (shards[1:] != shards[:-1]).sum() > 6  # mixed within a pair
    assert len({tuple(positions.tolist()) for positions in epochs}) == 40
    starts = torch.stack([(positions.unsqueeze(1) == torch.tensor([0, 25])).float().argmax(0) for positions in epochs])
    assert (starts < 22).any(0).all() and (starts > 45).any(0).all()  # any shard may come early or late


def test_ranks_share_the_order_and_another_seed_gives_another():
    index, first = torch.arange(100), torch.arange(0, 100, 10)
    whole = ShardOrder(index, first, 4, 12, 3).batches(2)
    parts = [ShardOrder(index, first, 4, 4, 3, rank, 3).batches(2) for rank in range(3)]
    for step, batches in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(step, torch.cat(batches))
    assert not torch.equal(whole[0], ShardOrder(index, first, 4, 12, 4).batches(2)[0])
    assert ShardOrder(index, first, 4, 12, 3).plan != ShardOrder(index, first, 5, 12, 3).plan


def test_batches_of_two_processes_are_augmented_by_their_keys(shards):
    seen = []
    for rank in range(2):
        data = attach(make(shards, seed=3, val_size=0.2), "cpu", rank, 2)
        for x, _, index in data.train_dataloader():
            keys = hash_keys(3, AUGMENT, 1, index)
            assert torch.equal(x, data.train_set.read(index, keys)[0])
            assert not torch.equal(x, data.train_set.read(index, None)[0])
            seen += index.tolist()
    assert len(seen) == len(set(seen)) == 48 == len(data.split[0])
    assert data.split[1].tolist() == list(range(48, 60)) and set(seen) == set(range(48))
    validated = [i for *_, index in attach(make(shards, val_size=0.2), "cpu").val_dataloader() for i in index.tolist()]
    assert validated == list(range(48, 60))


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_is_an_uninterrupted_one(shards, tmp_path, workers):
    def fit(**kwargs):
        return fit_module(tmp_path, make(shards, num_workers=workers, batch_size=10), max_epochs=2, **kwargs)

    saver = SaveAt(tmp_path)
    full = fit(callbacks=[saver])
    assert len(full.seen) == 10 and len({step[3] for step in full.seen}) == 10
    for name in ("batch2", "batch5", "validation5", "batch8"):
        path, batches = saver.saved[name]
        assert fit(ckpt=path).seen == full.seen[batches:], name
    said = r"samples a step, shards, mixed\) = \(0, 54, 10, \d+, 3\) and cannot resume with \(0, 54, 10, \d+, 2\): use the same"
    with pytest.raises(ValueError, match=said):
        fit_module(tmp_path, make(shards, num_workers=0, batch_size=10, mixed=2), max_epochs=2, ckpt=saver.saved["batch2"][0])


# Fetching ------------------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(shards):
    Quiet.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def curl():
    from shutil import which

    if which("curl") is None:
        pytest.skip("webdataset fetches by curl")


def test_shards_are_fetched_once_and_when_they_are_needed(shards, url, curl, tmp_path):
    data = make(tmp_path / "new", url=url, num_workers=2)
    assert data.num_classes == 3 and Quiet.asked == ["/train.npz"]
    batches = iter(data.train_dataloader())
    next(batches)
    data.teardown("fit")  # nobody reads ahead any more
    assert len(Quiet.asked) < 1 + len(data.train_set.index.shards)
    for one, other in zip(data.test_dataloader(), make(shards).test_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    count = len(Quiet.asked)
    list(data.test_dataloader())
    assert len(Quiet.asked) == count == len(set(Quiet.asked))
    list(make(tmp_path / "new").test_dataloader())  # what was fetched is enough
    with pytest.raises(FileNotFoundError, match=r"lacks \d+ of \d+ shards, such as train-0000"):
        make(tmp_path / "new").train_set  # noqa: B018


def test_what_cannot_be_fetched_is_named(shards, url, curl, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere/train\.npz cannot be fetched \(curl: exit \d+\): check url"):
        make(tmp_path, url=url + "/nowhere").class_names  # noqa: B018
    data = make(tmp_path, url=url)
    data.train_set.index.lengths += 1
    with pytest.raises(ValueError, match=r"train-0000\d\d\.tar has \d+ bytes, not \d+: it was cut short"):
        next(iter(data.train_dataloader()))
    assert not list(tmp_path.glob(".*.part"))
    data.test_set  # noqa: B018
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for workers in (0, 1):  # a worker says it in one sentence, too
        data.num_workers = workers
        with pytest.raises(ImportError, match=r"^shards are written .*robust_pl\[stream\]"):
            next(iter(data.test_dataloader()))
    with pytest.raises(ImportError, match=r"robust_pl\[stream\]"):  # and it is said before a run begins
        make(tmp_path, url=url).setup("fit")


# Bad input and the command line --------------------------------------------------------------------------------------


def test_bad_arguments(shards, tmp_path):
    for more, message in (
        ({"mixed": 0}, "mixed=0 is a number of shards"),
        ({"image_size": 12}, "image_size=12 must be at least 1 and at most resize=10"),
    ):
        with pytest.raises(ValueError, match=message):
            make(shards, **more)
    for name, part in (("class_names", "train"), ("test_set", "val")):
        with pytest.raises(FileNotFoundError, match=rf"{part}\.npz does not exist: set data_dir .*write_shards"):
            getattr(make(tmp_path), name)
    for url in ("pipe:touch here", "/somewhere", "-o x"):
        with pytest.raises(ValueError, match="is no address that shards can be fetched from: it must begin with https:// or"):
            make(tmp_path, url=url).test_set  # noqa: B018
    index = ShardIndex.load(shards, "val")
    index.shards = np.array(["../val-000000.tar"])
    index.save(tmp_path / "val.npz")
    with pytest.raises(ValueError, match=r"damaged \('../val-000000.tar' is no name of a file"):
        make(tmp_path).test_set  # noqa: B018
    (tmp_path / "val.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no index of shards, or damaged"):
        make(tmp_path).test_set  # noqa: B018


def copied(shards: Path, target: Path) -> ShardedImagesDataModule:
    for path in shards.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return make(target)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named(shards, tmp_path, workers):
    data = copied(shards, tmp_path)
    data.num_workers = workers
    with (tmp_path / str(data.test_set.index.shards[0])).open("r+b") as file:
        file.seek(data.test_set.index.offsets[0])
        file.write(b"nonsense")
    with pytest.raises(ValueError, match=r"sample 0 in .*tar cannot be read as an image \(its \d+ bytes are of no format that"):
        next(iter(data.test_dataloader()))


def test_a_shard_that_was_cut_short_is_found_before_anything_runs(shards, tmp_path):
    data = copied(shards, tmp_path)
    path = tmp_path / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 512)
    for url in (None, "http://127.0.0.1:9"):  # it is not fetched again either
        data = make(tmp_path, url=url)
        with pytest.raises(ValueError, match=rf"train-000001\.tar has {size - 512} bytes, not {size}: it was cut short"):
            data.setup("fit")


def test_a_test_set_of_other_classes_is_refused(folders, shards, tmp_path):
    data = copied(shards, tmp_path)
    assert data.class_names == ["ant", "bee", "cow"]
    index = ShardIndex.load(shards, "val")
    for classes in (["ant", "cow", "bee"], ["ant", "bee", "cow", "dog"]):
        replace(index, classes=np.array(classes)).save(tmp_path / "val.npz")
        with pytest.raises(ValueError, match=rf"val\.npz has {len(classes)} classes, not the 3 of train\.npz, or other ones: "):
            make(tmp_path).setup("test")
    assert len(make(tmp_path).train_set) == TRAIN


def test_an_index_that_no_writer_wrote_is_refused(shards, tmp_path):
    whole = ShardIndex.load(shards, "train")
    far = whole.offsets.copy()
    far[3] = whole.lengths.max()
    for change, message in (
        ({"labels": whole.labels + 1}, "labels outside of its 3 classes"),
        ({"sizes": whole.sizes[1:]}, "columns are of unlike lengths"),
        ({"first": whole.first + 0.5}, "no whole numbers"),
        ({"first": whole.first[::-1]}, "shards do not follow each other"),
        ({"offsets": far}, "a sample lies outside of its shard"),
        ({"offsets": -whole.offsets}, "a sample lies outside of its shard"),
        ({"classes": np.arange(3)}, "classes and shards must be names"),
    ):
        replace(whole, **change).save(tmp_path / "train.npz")
        with pytest.raises(ValueError, match=rf"train\.npz is no index of shards, or damaged \(.*{message}.*\): write it with"):
            make(tmp_path).class_names  # noqa: B018
    (tmp_path / "train.npz").write_bytes((shards / "train.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="is no index of shards, or damaged"):
        make(tmp_path).class_names  # noqa: B018
    ShardIndex.load(shards, "val").save(tmp_path / "train.npz")  # or one would train on the test set
    with pytest.raises(ValueError, match=r"val-000000\.tar is no shard of the part train"):
        make(tmp_path).class_names  # noqa: B018
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.npz"]


def test_command_line(folders, tmp_path, capsys):
    pytest.importorskip("webdataset")
    (tmp_path / "c/train/ant").mkdir(parents=True)
    for name in ("ant", "elk"):
        (tmp_path / "d/val" / name).mkdir(parents=True)
    (tmp_path / "d/train/ant").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "d/train/ant/1.png")
    (tmp_path / "file").touch()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/val-000007.tar").touch()  # an index comes last
    main([str(folders), str(tmp_path / "a"), "--shard_mb", "0.01"])
    out = capsys.readouterr().out
    assert f"{tmp_path / 'a' / 'train.npz'}: 60 samples of 3 classes in" in out and "val.npz: 9 samples of 3 classes in" in out
    for arguments, message in (
        ([folders, tmp_path / "a"], "train.npz exists: name another folder, or delete the shards in it"),
        ([folders, tmp_path / "killed"], "val-000007.tar exists: name another folder, or delete the shards in it"),
        ([tmp_path / "c", tmp_path / "b"], "holds no images"),
        ([tmp_path / "d", tmp_path / "b"], "has classes that the training folder has not: elk"),
        ([folders / "train", tmp_path / "b"], "holds neither train nor val"),
        ([folders, tmp_path / "b", "--shard_mb", "0"], "shard_mb=0.0 must be above 0"),
        ([folders, tmp_path / "b", "--shard_mb", "nan"], "shard_mb=nan must be above 0"),
        ([folders, tmp_path / "b", "--seed", "-1"], "seed=-1 must be at least 0"),
        ([folders, tmp_path / "file"], "file is a file: name a folder for the shards"),
        ([folders, tmp_path / "file/b"], "file/b cannot be written or read (Not a directory): name another folder"),
        ([folders, tmp_path / "b", "--resize", "0"], "resize=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        assert exit_info.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_written_and_trained_on_as_a_user_does(folders, tmp_path):
    pytest.importorskip("webdataset")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def run(*arguments: str, ends_with: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
        )
        assert done.returncode == ends_with, done.stderr
        return done.stderr if ends_with else done.stdout

    assert "60 samples" in run("robust_pl.data.write_shards", str(folders), "my shards")
    (tmp_path / "run.yaml").write_text(
        """
model: {class_path: StandardTraining, init_args: {net: {class_path: SmallCNN, init_args: {width: 4, in_channels: 3}}}}
data:
  class_path: ShardedImagesDataModule
  init_args: {data_dir: my shards, batch_size: 10, image_size: 8, resize: 10}
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""
    )
    run("robust_pl", "fit", "-c", "run.yaml")
    with (tmp_path / "my shards/train-000000.tar").open("r+b") as file:
        file.write(bytes(20_000))  # a dozen samples, of the same length
    said = run("robust_pl", "fit", "-c", "run.yaml", "--data.init_args.num_workers", "2", ends_with=2)
    (sentence,) = [line for line in said.splitlines() if "error: " in line]
    assert "my shards/train-000000.tar cannot be read as an image (its" in sentence and "Traceback" not in said
    os.truncate(tmp_path / "my shards/train-000000.tar", 512)
    said = run("robust_pl", "fit", "-c", "run.yaml", ends_with=2)
    assert "my shards/train-000000.tar has 512 bytes, not" in said and "Traceback" not in said
