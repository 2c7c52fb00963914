"""Splits, order, shards and augmentation of the data modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from robust_pl.data import DigitsDataModule
from robust_pl.data.augment import crop_and_flip, shift
from robust_pl.data.base import ImageDataModule
from robust_pl.data.hashing import hash_keys, integers, permutation, uniform
from robust_pl.data.images import Images, ImagesInMemory
from robust_pl.data.loaders import EvalLoader, TrainLoader, TrainOrder


class Plain(Images):
    """Pixel values tell the position: sample i is i / 1000 everywhere."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def sample(self, position, key):
        return torch.full((1, 2, 2), position / 1000), position % 3


def indices(loader) -> list[int]:
    return [i for _, _, index in loader for i in index.tolist()]


# Random numbers ------------------------------------------------------------------------------------------------------


def test_splitmix64_reference_values():
    """The first outputs of SplitMix64 seeded with 0, as published with the xoshiro generators."""
    as_unsigned = [int(hash_keys(part)) % 2**64 for part in (0, 0x9E3779B97F4A7C15 - 2**64)]
    assert as_unsigned == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_uniform_is_uniform_and_independent():
    keys = hash_keys(3, 1, torch.arange(100_000))
    u, v = uniform(keys, 0), uniform(keys, 1)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8  # chi squared, 19 degrees of freedom, p = 0.001
    assert abs(float(torch.corrcoef(torch.stack([u, v]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.01  # neighbouring samples
    other_epoch = uniform(hash_keys(3, 2, torch.arange(100_000)), 0)
    assert abs(float(torch.corrcoef(torch.stack([u, other_epoch]))[0, 1])) < 0.01


def test_hash_depends_on_the_order_of_its_parts():
    assert hash_keys(1, 2) != hash_keys(2, 1)
    assert torch.equal(permutation(9, 5).sort().values, torch.arange(9))


# Augmentation --------------------------------------------------------------------------------------------------------


def test_shift_by_hand():
    """Each result is the crop of the padded image at the offsets that the key says."""
    x = torch.arange(1, 33, dtype=torch.uint8).view(1, 2, 4, 4).repeat(50, 1, 1, 1)
    keys = hash_keys(torch.arange(50))
    out = shift(x, keys, pixels=2, flip=True)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i in range(50):
        top, left, flip = (int(integers(keys[i], draw, high)) for draw, high in ((0, 5), (1, 5), (2, 2)))
        expected = padded[i, :, top : top + 4, left : left + 4]
        assert torch.equal(out[i], expected.flip(2) if flip else expected)


def test_crop_offsets_and_flip_rate():
    """One bright pixel shows where the crop was: every offset equally often, half of the images flipped."""
    n = 20_000
    x = torch.zeros(n, 1, 32, 32, dtype=torch.uint8)
    x[:, 0, 16, 10] = 255
    out = crop_and_flip(x, hash_keys(torch.arange(n)))
    assert out.shape == x.shape and out.dtype == torch.uint8
    row, column = out.view(n, -1).argmax(1) // 32, out.view(n, -1).argmax(1) % 32
    assert torch.equal(torch.bincount(row).nonzero().flatten(), torch.arange(12, 21))  # 16 - 4 ... 16 + 4
    flipped = column > 16  # 10 +- 4 against 21 +- 4
    assert abs(float(flipped.float().mean()) - 0.5) < 0.015
    assert set(column[~flipped].tolist()) == set(range(6, 15))
    assert set(column[flipped].tolist()) == set(range(17, 26))
    assert torch.bincount(row)[12:].min() > n / 9 * 0.9


def test_augmentation_depends_on_seed_epoch_and_sample_only():
    def pixels(batch_size: int, workers: int = 0, epoch: int = 0, seed: int = 0) -> dict[int, torch.Tensor]:
        data = DigitsDataModule(batch_size=batch_size, num_workers=workers, augment=True, seed=seed, drop_last=False)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {int(i): image for x, _, index in loader for image, i in zip(x, index, strict=True)}

    def same(a, b) -> float:
        common = a.keys() & b.keys()
        return sum(torch.equal(a[i], b[i]) for i in common) / len(common)

    reference = pixels(100)
    state = torch.get_rng_state()
    assert same(reference, pixels(37)) == same(reference, pixels(100, workers=2)) == 1
    assert same(reference, pixels(100, epoch=1)) < 0.2
    assert same(reference, pixels(100, seed=1)) < 0.2
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the global stream


def test_no_augmentation():
    data = DigitsDataModule(batch_size=100)
    x, y, index = next(iter(data.train_dataloader()))
    assert torch.equal(x, data.train_set.images[index].float() / 16)
    assert torch.equal(y, data.train_set.labels[index])


# Splits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("val_size", "expected"), [(0.1, 144), (200, 200), (0, 0), (0.5, 718)])
def test_split(val_size, expected):
    data = DigitsDataModule(val_size=val_size)
    train, val = data.split
    assert len(val) == expected
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1437))
    assert torch.equal(val, val.sort().values)
    if expected:
        assert not torch.equal(val, DigitsDataModule(val_size=val_size, seed=1).split[1])
        assert indices(data.val_dataloader()) == val.tolist()
    else:
        assert data.val_dataloader() == []
    assert sorted(indices(DigitsDataModule(val_size=val_size, batch_size=1).train_dataloader())) == train.tolist()


def test_test_set_does_not_depend_on_the_seed():
    one, two = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    assert torch.equal(one.test_set.images, two.test_set.images)
    assert len(one.test_set) == 360
    assert indices(one.test_dataloader()) == list(range(360)) == indices(one.predict_dataloader())


def test_the_usual_split_of_the_digits_stays():
    """Figures in docs and headers were measured on exactly these 360."""
    data = DigitsDataModule()
    everyone = torch.cat(data.positions)
    assert torch.equal(everyone.sort().values, torch.arange(1797))
    assert data.positions[1][:8].tolist() == [21, 24, 28, 34, 35, 37, 39, 42]
    assert int((data.positions[1] * torch.arange(1, 361)).sum()) == 80439995
    assert int((data.test_set.images.long().flatten() * torch.arange(1, 360 * 64 + 1)).sum()) == 1292823137


def test_folds_partition_all_digits_by_class():
    folds = [DigitsDataModule(fold=fold, seed=seed) for fold, seed in enumerate((0, 1, 2, 3, 4))]
    assert torch.equal(torch.cat([data.positions[1] for data in folds]).sort().values, torch.arange(1797))
    assert torch.equal(folds[3].positions[1], DigitsDataModule(fold=3, seed=0).positions[1])  # the same for every seed
    every = torch.bincount(torch.cat([data.test_set.labels for data in folds]))
    for data in folds:
        train, test = data.positions
        assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(1797))
        assert torch.equal(test, test.sort().values) and torch.equal(train, train.sort().values)
        assert bool(((torch.bincount(data.test_set.labels) - every / 5).abs() < 1).all())
        # Numbers of samples are positions in the part, as they are without folds.
        assert indices(data.test_dataloader()) == list(range(len(test)))
        assert torch.equal(torch.cat(data.split).sort().values, torch.arange(len(train)))
        assert set(indices(data.val_dataloader())) == set(data.split[1].tolist())


def test_a_fold_holds_the_digits_that_its_positions_say():
    pixels, labels = load_digits(return_X_y=True)
    data = DigitsDataModule(fold=2, val_size=0)
    for loader, positions in ((data.test_dataloader(), data.positions[1]), (data.train_dataloader(), data.positions[0])):
        x, y, index = next(iter(loader))
        assert (16 * x.flatten(1)).tolist() == pixels[positions[index]].tolist()
        assert y.tolist() == labels[positions[index]].tolist()


@pytest.mark.parametrize("fold", [5, -1, True, 1.0, "0"])
def test_bad_folds(fold):
    with pytest.raises(ValueError, match="fold must be one of 0 to 4, or null for the usual split, not"):
        DigitsDataModule(fold=fold)


def test_batch_contract():
    data = DigitsDataModule(batch_size=32, eval_batch_size=50)
    assert (data.num_classes, data.in_channels) == (10, 1)
    for loader, size in ((data.train_dataloader(), 32), (data.val_dataloader(), 50), (data.test_dataloader(), 50)):
        batch = next(iter(loader))
        assert isinstance(batch, tuple)
        x, y, index = batch
        assert x.shape == (size, 1, 8, 8) and y.shape == index.shape == (size,)
        assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
        assert x.min() == 0 and x.max() == 1


# Ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_training_shards(world, drop_last):
    images, positions = Plain(101), torch.arange(101)
    orders = [TrainOrder(positions, 8, 0, rank, world, drop_last) for rank in range(world)]
    per_rank = [[index.tolist() for *_, index in TrainLoader(images, order)] for order in orders]
    assert len({len(batches) for batches in per_rank}) == 1 == len({len(order) for order in orders})
    assert len(per_rank[0]) == len(orders[0])
    seen = [i for batches in per_rank for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == (101 // (8 * world) * 8 * world if drop_last else 101)
    whole = [index.tolist() for index in TrainOrder(positions, 8 * world, 0, drop_last=drop_last).batches(0)]
    assert [[i for batches in per_rank for i in batches[s]] for s in range(len(whole))] == whole  # W ranks = one big one


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_shards(world):
    loaders = [EvalLoader(Plain(50), torch.arange(50), 8, rank, world) for rank in range(world)]
    chunks = [[index.tolist() for *_, index in loader] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in chunks]
    assert sorted(chunk for batches in chunks for chunk in batches) == [list(range(i, min(i + 8, 50))) for i in range(0, 50, 8)]


def test_evaluation_with_more_ranks_than_chunks():
    loaders = [EvalLoader(Plain(10), torch.arange(10), 8, rank, 3) for rank in range(3)]
    assert [indices(loader) for loader in loaders] == [list(range(8)), [8, 9], []]
    with pytest.raises(TypeError, match="no length"):
        len(loaders[0])


def test_ranks_come_from_the_trainer():
    data = DigitsDataModule(batch_size=64)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, overfit_batches=0, current_epoch=0)
    data.trainer.fit_loop = SimpleNamespace(batch_idx=-1)
    data.trainer.strategy, data.trainer.num_devices = SimpleNamespace(root_device=torch.device("cpu")), 2
    assert (data.train_dataloader().sampler.rank, data.train_dataloader().sampler.world_size) == (1, 2)
    assert indices(data.test_dataloader()) == [*range(64, 128), *range(192, 256), *range(320, 360)]


def test_overfit_batches_repeats_the_first_epoch():
    order = TrainOrder(torch.arange(50), 10, seed=0, fixed=True)
    loader = TrainLoader(Plain(50), order)
    first = indices(loader)
    order.set_epoch(5)
    assert indices(loader) == first


# Own data and errors -------------------------------------------------------------------------------------------------


class Own(ImageDataModule):
    class_names = ["a", "b", "c"]  # noqa: RUF012
    image_shape = (1, 2, 2)

    def load_train(self):
        return Plain(30)

    def load_test(self):
        return Plain(9)


def test_own_data_module():
    data = Own(batch_size=4)
    x, y, index = next(iter(data.train_dataloader()))
    assert torch.equal(x[:, 0, 0, 0], index / 1000) and torch.equal(y, index % 3)
    assert data.hparams["batch_size"] == 4 and set(data.hparams) >= {"data_dir", "val_size", "seed", "augment"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_size": 1.0}, "val_size must be a fraction"),
        ({"val_size": -1}, "val_size must be a fraction"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Own(**kwargs)


def test_too_small_sets():
    with pytest.raises(ValueError, match="batch_size=128"):
        Own().train_dataloader()
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        Own(val_size=30).train_dataloader()
    with pytest.raises(ValueError, match="uint8"):
        ImagesInMemory(torch.zeros(2, 1, 2, 2), torch.zeros(2))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_sentence(workers):
    class Broken(Plain):
        def sample(self, position, key):
            raise ValueError("broken.png cannot be read")

    with pytest.raises(ValueError) as error:
        next(iter(EvalLoader(Broken(4), torch.arange(4), 2, num_workers=workers)))
    assert str(error.value) == "broken.png cannot be read"


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path))
    assert Own().data_dir == tmp_path
    assert str(Own(data_dir="elsewhere").data_dir) == "elsewhere"
    monkeypatch.delenv("ROBUST_PL_DATA")
    assert str(Own().data_dir) == "data"
