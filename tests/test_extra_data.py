"""Generated samples in training batches: composition, ranks, resuming, files mapped into memory, labels of a teacher."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robust_pl.data import CropAndFlip, CutMix, DigitsDataModule, ExtraDataMixture, LabelSmoothing
from robust_pl.data.base import ImageDataModule
from robust_pl.data.extra_data import MixedOrder
from robust_pl.data.extra_images import open_extra
from robust_pl.data.hashing import EXTRA, ORDER, permutation, permuted
from robust_pl.data.images import ImagesInMemory
from robust_pl.nets import Frozen, SmallCNN

from .test_data import Plain, indices
from .test_data_resume import SaveAt, fit_module

REAL = 1437  # digits of the training set, validation samples included


def write(folder: Path, count: int = 500, name: str = "extra.npz", save=np.savez, **arrays) -> Path:
    """Image i shows i % 256 everywhere and has the label i % 10."""
    image = np.broadcast_to((np.arange(count) % 256).astype(np.uint8)[:, None, None, None], (count, 8, 8, 1))
    content = {"image": image, "label": np.arange(count) % 10} | arrays
    save(folder / name, **{k: v for k, v in content.items() if v is not None})
    return folder / name


def mixture(path: Path, fraction: float = 0.7, data: ImageDataModule | None = None, **kwargs) -> ExtraDataMixture:
    return ExtraDataMixture(data or DigitsDataModule(batch_size=60), str(path), fraction, **kwargs)


class Black(ImageDataModule):
    """1536 black images of any shape."""

    class_names = [str(label) for label in range(10)]  # noqa: RUF012

    def __init__(self, image_shape: tuple[int, int, int], batch_size: int = 60) -> None:
        super().__init__(batch_size=batch_size, val_size=0)
        self.image_shape = image_shape

    def load_train(self):
        return ImagesInMemory(torch.zeros(1536, *self.image_shape, dtype=torch.uint8), torch.zeros(1536))

    def load_test(self):
        return self.load_train()


# Composition ---------------------------------------------------------------------------------------------------------


def test_every_batch_has_the_same_share(tmp_path):
    data = mixture(write(tmp_path))
    loader = data.train_dataloader()
    assert len(loader) == 22  # ceil(1293 / 60), as without generated samples
    real, generated = [], []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for x, y, index in loader:
            extra = index >= REAL
            assert len(index) == 60 and int(extra.sum()) == 42
            assert torch.equal(x[extra], ((index[extra] - REAL) % 256 / 255).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8))
            assert torch.equal(y[extra], (index[extra] - REAL) % 10)
            assert torch.equal(x[~extra], data.train_set.images[index[~extra]].float() / 16)
            assert torch.equal(y[~extra], data.train_set.labels[index[~extra]])
            real += index[~extra].tolist()
            generated += index[extra].tolist()
    first, second = real[: len(real) // 2], real[len(real) // 2 :]
    assert len(first) == 22 * 18 == len(set(first)) and set(first) != set(second) and first != second
    assert set(real) <= set(data.split[0].tolist())  # no validation sample
    # 924 draws from 500: in each epoch, all of them once before any comes twice.
    for epoch in (generated[:924], generated[924:]):
        counts = np.bincount(np.array(epoch) - REAL, minlength=500)
        assert sorted(set(counts)) == [1, 2] and counts.sum() == 924
    assert generated[:924] != generated[924:]


def test_positions_by_hand():
    """Two processes, batches of 5 with 2 generated ones: what each of them reads in step 1 of epoch 3."""
    positions = torch.arange(100, 147)
    reals = positions[permutation(47, 9, ORDER, 3)]
    for rank in range(2):
        order = MixedOrder(positions, 1000, 7, 0.4, 5, 9, rank, 2)
        assert len(order) == 5  # ceil(47 / 10)
        slots = torch.arange(4 + 2 * rank, 6 + 2 * rank)  # step 0 took four
        generated = 1000 + permuted(slots % 7, 7, 9, EXTRA, 3, slots // 7)
        expected = [*reals[6 + 3 * rank : 9 + 3 * rank].tolist(), *generated.tolist()]
        assert sorted(order.batches(3)[1].tolist()) == sorted(expected)
    assert order.batches(3)[1].tolist() != expected  # in random order


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 21), (0.1, 22), (1.0, 22)])
def test_length_where_real_samples_would_not_last(tmp_path, fraction, steps):
    """1293 samples: 21 full batches of 60 real ones, or 22 with fewer."""
    loader = mixture(write(tmp_path), fraction).train_dataloader()
    assert len(loader) == steps
    found = [int((index >= REAL).sum()) for _, _, index in loader]
    assert found == [round(60 * fraction)] * steps


def test_validation_and_test_are_those_of_the_real_data(tmp_path):
    inner, outer = DigitsDataModule(seed=4, val_size=100), mixture(write(tmp_path), data=DigitsDataModule(val_size=100), seed=4)
    assert torch.equal(inner.split[0], outer.split[0]) and torch.equal(inner.split[1], outer.split[1])
    assert indices(inner.val_dataloader()) == indices(outer.val_dataloader())
    for one, other in zip(inner.test_dataloader(), outer.test_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (outer.num_classes, outer.in_channels, outer.image_shape) == (10, 1, (1, 8, 8))
    assert outer.class_names == inner.class_names and outer.data.seed == 4
    assert ExtraDataMixture(DigitsDataModule(seed=3), "x.npz").seed == 3
    outer.setup("test")  # needs no file of generated samples
    missing = mixture(tmp_path / "missing.npz")
    missing.setup("test")
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        missing.setup("fit")


def test_usual_augmentation_is_also_that_of_generated_images(tmp_path):
    image = np.zeros((500, 8, 8, 1), np.uint8)
    image[:, 4, 4] = 255
    data = mixture(write(tmp_path, image=image), data=DigitsDataModule(batch_size=60, augment=True))
    x, _, index = next(iter(data.train_dataloader()))
    places = x[index >= REAL].flatten(1)
    assert torch.equal(places.sum(1), torch.ones(42))
    assert set(places.argmax(1).tolist()) == {8 * r + c for r in (3, 4, 5) for c in (3, 4, 5)}

    class Files(DigitsDataModule):
        def load_train(self):
            return Plain(300)

    with pytest.raises(ValueError, match="Files augments images as it decodes files"):
        mixture(tmp_path / "extra.npz", data=Files(augment=True)).setup("fit")


# Ranks and resuming --------------------------------------------------------------------------------------------------


def test_ranks_are_disjoint_and_together_one_process():
    whole = MixedOrder(torch.arange(1000), 1000, 5000, 0.7, 40, 3)
    parts = [MixedOrder(torch.arange(1000), 1000, 5000, 0.7, 10, 3, rank, 4) for rank in range(4)]
    assert {len(part) for part in parts} == {len(whole)}
    for epoch in range(2):
        ranks = [part.batches(epoch) for part in parts]
        seen = torch.cat([batch for batches in ranks for batch in batches])
        assert len(seen) == len(seen.unique()) == 1000  # real and generated ones alike
        for step, together in enumerate(whole.batches(epoch)):
            assert torch.equal(torch.cat([batches[step] for batches in ranks]).sort().values, together.sort().values)
    assert not torch.equal(parts[0].batches(0)[0], parts[0].batches(1)[0])


@pytest.mark.parametrize("augment", [True, [CropAndFlip(1, flip=False), CutMix(), LabelSmoothing()]], ids=["usual", "list"])
def test_resume_from_every_checkpoint(tmp_path, augment):
    path = write(tmp_path)

    def fit(**kwargs):
        return fit_module(
            tmp_path, mixture(path, data=DigitsDataModule(batch_size=256, augment=augment)), max_epochs=2, **kwargs
        )

    saver = SaveAt(tmp_path)
    full = fit(callbacks=[saver])
    assert len(full.seen) == 12
    for name, (checkpoint, batches) in saver.saved.items():
        assert fit(ckpt=checkpoint).seen == full.seen[batches:], name
    hparams = torch.load(saver.saved["epoch6"][0], weights_only=True)["datamodule_hyper_parameters"]
    assert "data" not in hparams and hparams["fraction"] == 0.7


def test_another_file_cannot_resume_mid_epoch(tmp_path):
    loader = mixture(write(tmp_path)).train_dataloader()
    next(iter(loader))
    other = mixture(write(tmp_path, 501)).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="cannot resume"):
        next(iter(other))


SCRIPT = """
import json, sys
import numpy as np
from lightning.pytorch import Trainer
from torch import nn
from robust_pl.data import DigitsDataModule, ExtraDataMixture
from tests.test_data_resume import Recorder

folder = sys.argv[1]
teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
nn.init.constant_(teacher[1].weight, 0); nn.init.constant_(teacher[1].bias, 0); teacher[1].bias.data[3] = 1
data = ExtraDataMixture(DigitsDataModule(batch_size=64), f"{folder}/extra.npz", 0.75, teacher)
module = Recorder()
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
trainer.fit(module, data)
json.dump([row[2] for row in module.seen], open(f"{folder}/rank{trainer.global_rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    write(tmp_path, 3000, save=np.savez_compressed, label=None)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", tmp_path / "script.py", tmp_path], check=True, timeout=120, env=env)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    whole = MixedOrder(mixture(tmp_path).split[0], REAL, 3000, 0.75, 128, 0)
    expected = [batch.sort().values.tolist() for epoch in range(2) for batch in whole.batches(epoch)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == expected
    left = sorted(path.name for path in tmp_path.glob("*extra.npz*"))
    assert len(left) == 3, left  # the file, its unpacked images and their labels, and no half of anything
    labels = np.load(next(tmp_path.glob("*.label-*.npy")))
    assert labels.shape == (3000,) and (labels == 3).all()


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "zip64", "compressed", "folder", "npy", "channels first"])
def test_kinds_of_files(tmp_path, kind):
    path = write(tmp_path)
    arrays = dict(np.load(path))
    if kind == "compressed":
        path = write(tmp_path, name="small.npz", save=np.savez_compressed)
    elif kind == "zip64":  # its local headers are longer than the directory says
        path = tmp_path / "zip64.npz"
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array)
    elif kind in ("folder", "npy"):
        np.save(tmp_path / "image.npy", arrays["image"])
        np.save(tmp_path / "label.npy", arrays["label"].astype(np.uint8))
        path = tmp_path if kind == "folder" else tmp_path / "image.npy"
    elif kind == "channels first":
        path = write(tmp_path, name="first.npz", image=arrays["image"].transpose(0, 3, 1, 2))
    extra = mixture(path).extra_set
    index = torch.tensor([499, 3, 3, 270])
    x, y = extra.read(index, None)
    assert len(extra) == 500 and x.shape == (4, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, (index % 256 / 255).float().view(-1, 1, 1, 1).expand(4, 1, 8, 8)) and torch.equal(y, index % 10)
    assert isinstance(extra.images.array.base, mmap) and not extra.images.array.flags.writeable
    copied = pickle.loads(pickle.dumps(extra))  # what a worker gets
    assert len(pickle.dumps(extra)) < 3000 and torch.equal(copied.read(index, None)[0], x)


def test_channels_are_where_they_belong(tmp_path):
    """Colour images, both ways of writing them."""
    image = np.arange(5 * 4 * 6 * 3).reshape(5, 4, 6, 3).astype(np.uint8)

    for name, array in (("last", image), ("first", image.transpose(0, 3, 1, 2)), ("fortran", np.asfortranarray(image))):
        path = write(tmp_path, name=f"{name}.npz", image=array, label=np.arange(5))
        x, _ = mixture(path, data=Black((3, 4, 6))).extra_set.read(torch.tensor([4, 0]), None)
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(image[[4, 0]].transpose(0, 3, 1, 2).copy())), name


def test_a_compressed_file_is_unpacked_once(tmp_path):
    path = write(tmp_path, save=np.savez_compressed)
    _ = mixture(path).extra_set
    unpacked = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("extra.npz.*")}
    assert sorted(name.split("-")[0] for name in unpacked) == ["extra.npz.image", "extra.npz.label"]
    _ = mixture(path).extra_set
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("extra.npz.*")} == unpacked
    write(tmp_path, 600, save=np.savez_compressed)  # other content under the same name
    assert len(mixture(path).extra_set) == 600
    assert not list(tmp_path.glob(".extra*"))


def test_a_file_is_looked_for_under_data_dir(tmp_path):
    write(tmp_path)
    assert len(mixture(Path("extra.npz"), data=DigitsDataModule(str(tmp_path))).extra_set) == 500


def resident() -> int:
    """Bytes of memory in use by this process that are its own, not pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux counts it")
def test_ten_million_images_are_not_read_into_memory(tmp_path):
    """31 GB, of which almost all is a hole in the file."""
    count = 10_000_000
    image = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, (count, 32, 32, 3))
    image[count - 1] = 77
    del image
    np.save(tmp_path / "label.npy", np.zeros(count, np.uint8))
    assert (tmp_path / "image.npy").stat().st_size > 30e9

    data = mixture(tmp_path, fraction=1.0, data=Black((3, 32, 32), 256))
    before = resident()
    seen = [int(i) for _, _, index in data.train_dataloader() for i in index]
    x, _ = data.extra_set.read(torch.tensor([0, count - 1]), None)
    assert resident() - before < 200e6
    assert len(set(seen)) == len(seen) == 6 * 256 and max(seen) - min(seen) > 9_900_000
    assert not x[0].any() and torch.equal((x[1] * 255).round(), torch.full((3, 32, 32), 77.0))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((500, 9, 9, 1), np.uint8)}, r"\(500, 9, 9, 1\): the data need uint8 of shape \(N, 8, 8, 1\)"),
        ({"image": np.zeros((500, 8, 8, 1), np.float32)}, "type float32"),
        ({"image": np.zeros((0, 8, 8, 1), np.uint8), "label": np.zeros(0, int)}, r"shape \(0, 8, 8, 1\)"),
        ({"image": None}, "holds no array 'image'"),
        ({"label": None}, "no labels beside it"),
        ({"label": np.zeros(499, int)}, r"shape \(499,\) for 500 images"),
        ({"label": np.zeros(500)}, "whole numbers"),
        ({"label": np.full(500, 10)}, "from 10 to 10: the 10 classes of the data are 0 to 9"),
        ({"label": np.full(500, -1)}, "from -1 to -1"),
        ({"label": np.array([None] * 500)}, "Python objects"),
    ],
)
def test_files_that_do_not_fit(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as error:
        mixture(write(tmp_path, **arrays)).setup("fit")
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="damaged or not an npz file"):
        open_extra(path)
    np.save(tmp_path / "image.npy", np.zeros((500, 8, 8, 1), np.uint8))
    whole = (tmp_path / "image.npy").read_bytes()
    (tmp_path / "image.npy").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="cut short, 7 bytes are missing"):
        open_extra(tmp_path)
    (tmp_path / "image.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="not a NumPy array"):
        open_extra(tmp_path)
    packed = bytearray(write(tmp_path, save=np.savez_compressed, name="packed.npz").read_bytes())
    packed[200] ^= 255
    (tmp_path / "packed.npz").write_bytes(packed)
    with pytest.raises(ValueError, match="damaged or not an npz file"):
        open_extra(tmp_path / "packed.npz")
    assert not list(tmp_path.glob("*packed.npz?*"))
    (tmp_path / "images.txt").touch()
    with pytest.raises(ValueError, match=r"must be \.npz, \.npy, or a folder"):
        open_extra(tmp_path / "images.txt")


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        mixture(tmp_path, fraction=1.5)
    with pytest.raises(ValueError, match="do not fill one step of batch_size=2000 with fraction=0"):
        mixture(write(tmp_path), 0.0, DigitsDataModule(batch_size=2000)).train_dataloader()


# A teacher -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Answers by the brightness of the image, and counts how many it is asked for."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.asked = 0

    def forward(self, x):
        self.asked += len(x)
        label = ((x[:, 0, 0, 0] * 255).round().long() + self.shift) % 10
        return nn.functional.one_hot(label, 10).float()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_teacher_labels_once(tmp_path, save):
    path, teacher = write(tmp_path, label=None, save=save), Counting()
    y = mixture(path, teacher=teacher).extra_set.read(torch.arange(500), None)[1]
    assert teacher.asked == 500 and torch.equal(y, torch.arange(500) % 256 % 10)
    again = Counting()
    assert torch.equal(mixture(path, teacher=again).extra_set.read(torch.arange(500), None)[1], y)
    assert again.asked == 0
    other = Frozen(Counting(1))  # whose state dict is empty
    assert torch.equal(mixture(path, teacher=other).extra_set.read(torch.arange(500), None)[1], (y + 1) % 10)
    assert other.net.asked == 500
    write(tmp_path, 400, label=None, save=save)  # other images
    assert len(mixture(path, teacher=again).extra_set) == 400 and again.asked == 400


def test_a_teacher_replaces_labels_and_must_know_the_classes(tmp_path):
    path = write(tmp_path)
    y = mixture(path, teacher=Counting(2)).extra_set.read(torch.arange(100), None)[1]
    assert torch.equal(y, (torch.arange(100) + 2) % 10)
    with pytest.raises(ValueError, match="7 logits for 10 classes"):
        _ = mixture(path, teacher=SmallCNN(num_classes=7, width=4, in_channels=1)).extra_set
    assert not list(tmp_path.glob(".*"))


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_yaml(robust_pl, tiny: Path):
    write(Path())
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1, "--run.name", "teacher")
    text = tiny.read_text()
    start, end = text.index("data:\n"), text.index("attacks:\n")
    tiny.write_text(
        text[:start]
        + """
data:
  class_path: ExtraDataMixture
  init_args:
    extra: extra.npz
    fraction: 0.5
    teacher: {class_path: TrainedNet, init_args: {source: runs/teacher}}
    data:
      class_path: DigitsDataModule
      init_args: {batch_size: 128, augment: [{class_path: CutMix}]}
"""
        + text[end:]
    )
    robust_pl("fit", "-c", tiny, "--seed_everything", 5, "--trainer.max_epochs", 1)
    state = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert state["ExtraDataMixture"]["train"]["plan"] == [5, 1293, 128, 64, 500]
    assert len(list(Path().glob("extra.npz.label-*.npy"))) == 1
    Path("extra.npz").unlink()  # a test needs no generated images
    robust_pl("test", "--ckpt_path", "runs/tiny/checkpoints/best.ckpt")
    report = json.loads(next(Path("runs/tiny/test").glob("*.json")).read_text())
    assert report is not None
    assert "ExtraDataMixture" not in next(Path("runs/tiny/test").glob("report.md")).read_text().split("```")[0]
