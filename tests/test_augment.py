"""Augmentations of whole batches: numbers by hand, keys, and where a data module applies them."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy.special import betainc

from robust_pl.callbacks import PGD
from robust_pl.data import AsUsual, CropAndFlip, CutMix, Cutout, DigitsDataModule, LabelSmoothing, RandAugment
from robust_pl.data.augmentations import augmented, box
from robust_pl.data.hashing import AUGMENT, hash_keys, integers, permuted
from robust_pl.data.rand_augment import OPERATIONS
from robust_pl.methods import PGDAT, TRADES
from robust_pl.nets import SmallCNN

from .test_data_resume import SaveAt, fit_module


def batch(count: int = 12, size: int = 8, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels that tell sample and place apart, labels 0..4 in turn, and keys."""
    x = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 5, hash_keys(7, torch.arange(count))


def one_hot(y: torch.Tensor) -> torch.Tensor:
    return F.one_hot(y, 5).float()


# Pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "pad"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_by_hand(mode, pad, flip):
    x, y, keys = batch(50)
    out, same = CropAndFlip(2, mode, flip)(x, y, keys)
    padded = F.pad(x, (2,) * 4, pad)
    for i in range(50):
        top, left, mirrored = (int(integers(keys[i], draw, high)) for draw, high in ((0, 5), (1, 5), (2, 2)))
        expected = padded[i, :, top : top + 8, left : left + 8]
        assert torch.equal(out[i], expected.flip(2) if mirrored and flip else expected)
    assert torch.equal(same, y)


def test_a_box_is_where_its_draws_say():
    keys = hash_keys(torch.arange(300))
    rows, columns = box(keys, 5, (6, 9), 3, torch.full((300,), 4))
    for i in range(300):
        row, column = int(integers(keys[i], 5, 6)), int(integers(keys[i], 6, 9))
        assert rows[i].nonzero().flatten().tolist() == [r for r in range(row - 1, row + 2) if 0 <= r < 6]
        assert columns[i].nonzero().flatten().tolist() == [c for c in range(column - 2, column + 2) if 0 <= c < 9]


def test_cutout_blots_out_one_square():
    x, y, keys = batch(400)
    out, _ = Cutout(3, fill=0.5)(x, y, keys)
    changed = (out != x).all(1)
    assert torch.equal(out[~changed.unsqueeze(1).expand_as(out)], x[~changed.unsqueeze(1).expand_as(x)])
    assert (out[changed.unsqueeze(1).expand_as(out)] == 0.5).all()
    # A centre in the middle cuts 9 pixels, one at an edge 6, one in a corner 4: 36 to 24 to 4 of 64 centres.
    areas = changed.sum((1, 2))
    counts = torch.bincount(areas, minlength=10)
    assert counts[9] + counts[6] + counts[4] == 400
    assert abs(float(areas.double().mean()) - (36 * 9 + 24 * 6 + 4 * 4) / 64) < 0.25


@pytest.mark.parametrize("name", OPERATIONS[6:])
def test_colours_are_those_of_pil(name):
    """On 8-bit levels; PIL rounds what it blends with, 0.45 of it here, and truncates the result: ours keeps fractions."""
    levels = torch.randint(20, 230, (2, 3, 24, 24), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    chosen, sign = torch.full((2,), OPERATIONS.index(name)), torch.tensor([1.0, -1.0])
    out = RandAugment(1, magnitude=5).operate(levels.float() / 255, chosen, sign)
    for i in range(2):
        theirs = np.array(of_pil(name, Image.fromarray(levels[i].permute(1, 2, 0).numpy()), 1 + 0.45 * float(sign[i])))
        theirs = torch.from_numpy(theirs).permute(2, 0, 1).float()
        assert float((out[i] * 255 - theirs).abs().max()) <= 1.5, name
        assert not torch.equal(theirs, levels[i].float())


def of_pil(name: str, image: Image.Image, factor: float) -> Image.Image:
    """The same at magnitude 5."""
    arguments = {"solarize": [128], "posterize": [6]}.get(name, [])
    if hasattr(ImageOps, name):
        return getattr(ImageOps, name)(image, *arguments)
    return getattr(ImageEnhance, name.title())(image).enhance(factor)


def test_geometry_by_hand():
    """One bright pixel: where it goes says what was done. Shapes that are not square keep angles."""
    augment, x = RandAugment(1, magnitude=10), torch.zeros(1, 1, 40, 20)
    x[0, 0, 29, 9] = 1.0  # 9.5 rows below the middle, half a column left of it

    def goes(name: str, sign: float) -> tuple[int, int]:
        out = augment.operate(x, torch.tensor([OPERATIONS.index(name)]), torch.tensor([sign]))
        return divmod(int(out.argmax()), 20)

    assert goes("identity", 1.0) == (29, 9)
    assert goes("translate_x", 1.0) == (29, 3) and goes("translate_x", -1.0) == (29, 15)  # 0.3 of 20
    assert goes("translate_y", 1.0) == (17, 9)  # 0.3 of 40
    assert goes("shear_x", 1.0) == (29, 6)  # by 0.3 * 9.5 = 2.85
    assert goes("rotate", 1.0) in ((28, 14), (27, 14), (28, 13))  # 9.51 pixels from the middle, turned by 30 degrees
    assert goes("rotate", -1.0)[1] < 9


def test_rand_augment_draws_operations_of_every_kind_by_key():
    x, y, keys = batch(600, 16)
    augment = RandAugment(2, 9)
    out, same = augment(x, y, keys)
    assert torch.equal(same, y) and out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out[100:130], augment(x[100:130], y[100:130], keys[100:130])[0])  # whatever the batch
    assert not torch.equal(out, augment(x, y, hash_keys(8, torch.arange(600)))[0])
    assert set(integers(keys, 0, 14).tolist()) == set(range(14))
    untouched = (out == x).flatten(1).all(1).float().mean()
    assert 0 < float(untouched) < 0.1
    grey = torch.rand(8, 1, 8, 8)
    assert augment(grey, y[:8], keys[:8])[0].shape == grey.shape
    # Without magnitude only what has none is left to do.
    still, _ = RandAugment(1, 0)(x, y, keys)
    kept = ~torch.isin(integers(keys, 0, 14), torch.tensor([OPERATIONS.index("autocontrast"), OPERATIONS.index("equalize")]))
    assert torch.allclose(still[kept], x[kept], atol=2e-6)


def test_kornia_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match=r"robust_pl\[augment\]"):
        RandAugment()


# Labels --------------------------------------------------------------------------------------------------------------


def test_label_smoothing_by_hand():
    _, y = LabelSmoothing(0.1)(
        torch.zeros(2, 1, 1, 1), torch.tensor([[0.0, 1, 0, 0, 0], [0.25, 0.75, 0, 0, 0]]), torch.zeros(2)
    )
    expected = torch.tensor([[0.02, 0.92, 0.02, 0.02, 0.02], [0.245, 0.695, 0.02, 0.02, 0.02]])
    assert torch.allclose(y, expected, atol=1e-7)
    logits, hard = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    _, smooth = LabelSmoothing(0.3)(logits, F.one_hot(hard, 5).double(), torch.zeros(6))
    ours, torchs = F.cross_entropy(logits, smooth), F.cross_entropy(logits, hard, label_smoothing=0.3)
    assert abs(float(ours - torchs)) < 1e-12


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_cutmix_mixes_labels_by_the_area_that_it_pastes(alpha):
    keys = hash_keys(7, torch.arange(200))
    x = torch.arange(200.0).view(-1, 1, 1, 1).expand(200, 1, 32, 32) / 200  # every pixel tells whose it is
    out, y = CutMix(alpha)(x, F.one_hot(torch.arange(200), 200).double(), keys)
    whose = (out * 200).round().long().flatten(1)
    for i in range(200):
        shares = torch.bincount(whose[i], minlength=200).double() / 1024
        assert float((shares - y[i]).abs().max()) < 1e-12
        assert (shares > 0).sum() <= 2 and int(whose[i, 0]) in (i, *whose[i].tolist())
        pasted = (whose[i] != i).view(32, 32)
        rows, columns = pasted.any(1), pasted.any(0)
        assert int(pasted.sum()) == int(rows.sum()) * int(columns.sum())  # a full box
    assert torch.allclose(y.sum(1), torch.ones(200, dtype=torch.float64))
    partners = {int(w) for i in range(200) for w in whose[i].unique() if w != i}
    assert len(partners) > 100


def test_cutmix_draws_beta_numbers():
    u = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for alpha in (0.2, 1.0, 3.0):
        assert float((torch.from_numpy(betainc(alpha, alpha, CutMix(alpha)._beta(u).numpy())) - u).abs().max()) < 2e-4


def test_cutmix_partner_and_probability():
    x, y, keys = batch(64)
    _, mixed = CutMix(probability=0.25)(x, one_hot(y), keys)
    same, still = CutMix(probability=0.0)(x, one_hot(y), keys)
    assert torch.equal(same, x) and torch.equal(still, one_hot(y))
    assert 4 <= int((mixed.amax(1) < 1).sum()) <= 26
    # The order of the batch is no matter: partners follow from the keys.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    whole, shuffled = CutMix()(x, one_hot(y), keys), CutMix()(x[order], one_hot(y[order]), keys[order])
    assert torch.equal(whole[0][order], shuffled[0]) and torch.equal(whole[1][order], shuffled[1])
    alone = CutMix()(x[:1], one_hot(y[:1]), keys[:1])
    assert torch.equal(alone[0], x[:1]) and torch.allclose(alone[1], one_hot(y[:1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropAndFlip(-1), "padding=-1"),
        (lambda: CropAndFlip(mode="wrap"), "zero or reflect"),
        (lambda: CropAndFlip(8, "reflect")(*batch()), "below the image's size"),
        (lambda: Cutout(0), "size=0"),
        (lambda: Cutout(fill=2), "fill=2"),
        (lambda: CutMix(0), "alpha=0"),
        (lambda: CutMix(probability=1.5), "probability=1.5"),
        (lambda: LabelSmoothing(-0.1), "amount=-0.1"),
        (lambda: RandAugment(0), "num_ops=0"),
        (lambda: RandAugment(magnitude=11), "magnitude=11"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In a run ------------------------------------------------------------------------------------------------------------

EVERYTHING = (CropAndFlip(1), Cutout(3), RandAugment(), CutMix(), LabelSmoothing())


def test_a_list_is_applied_in_order_with_draws_of_its_own():
    x, y, index = torch.rand(6, 1, 8, 8), torch.arange(6), torch.arange(6) + 100
    out, labels, same = augmented((x, y, index), [Cutout(2), Cutout(2), LabelSmoothing(0.2)], 10, seed=3, epoch=5)
    keys = hash_keys(3, AUGMENT, 5, index)
    first, _ = Cutout(2)(x, y, hash_keys(keys, 0))
    second, _ = Cutout(2)(first, y, hash_keys(keys, 1))
    assert torch.equal(out, second) and not torch.equal(first, second) and same is index
    assert torch.allclose(labels, 0.8 * F.one_hot(y, 10) + 0.02)
    for x_dtype, y_dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert augmented((x.to(x_dtype), y, index), [LabelSmoothing()], 10, 0, 0)[1].dtype == y_dtype


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda one: type(one).__name__)
def test_everything_stays_on_the_device_and_nothing_waits_for_it(augmentation):
    """Tensors of the meta device have no values to wait for, and do not mix with those of the CPU."""
    x, y = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    out, labels, _ = augmented((x, y, y), [deepcopy(augmentation)], 10, 0, 0)
    assert out.device.type == labels.device.type == "meta" and out.shape == x.shape


def test_resumed_augmentations_are_those_of_the_run_that_was_not_stopped(tmp_path: Path):
    def fit(**kwargs):
        return fit_module(tmp_path, DigitsDataModule(batch_size=256, augment=list(EVERYTHING)), max_epochs=2, **kwargs)

    saver = SaveAt(tmp_path)
    full = fit(callbacks=[saver])
    plain = fit_module(tmp_path, DigitsDataModule(batch_size=256), max_epochs=2)
    assert [row[2] for row in full.seen] == [row[2] for row in plain.seen]  # the order is another matter
    assert all(a[3] != b[3] for a, b in zip(full.seen, plain.seen, strict=True))
    assert full.validated == plain.validated
    for name in ("batch2", "epoch5", "batch8"):
        path, batches = saver.saved[name]
        assert fit(ckpt=path).seen == full.seen[batches:], name


def test_the_usual_augmentation_comes_before_others():
    """Digits are shifted as they are read, by draws of their own, and then blotted out."""

    def batch(augment: Any) -> torch.Tensor:
        data = DigitsDataModule(batch_size=256, augment=augment)
        data.setup("fit")
        return next(iter(data.train_dataloader()))[0]

    shifted = batch(True)
    assert torch.equal(batch([Cutout(2), AsUsual()]), shifted) and not torch.equal(batch([Cutout(2)]), shifted)
    x, keys = torch.rand(4, 1, 8, 8), torch.arange(4)
    assert AsUsual()(x, keys, keys)[0] is x


def test_validation_sees_plain_images_and_a_checkpoint_no_object(tmp_path: Path):
    saver = SaveAt(tmp_path)
    data = DigitsDataModule(batch_size=256, augment=[Cutout(8), LabelSmoothing()])
    module = fit_module(tmp_path, data, max_epochs=1, callbacks=[saver])
    assert module.validated_pixels == fit_module(tmp_path, DigitsDataModule(batch_size=256), max_epochs=1).validated_pixels
    checkpoint = torch.load(saver.saved["epoch5"][0], weights_only=True)
    assert "augment" not in checkpoint["datamodule_hyper_parameters"]


@pytest.mark.parametrize("method", [PGDAT, TRADES])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "64-true"])
def test_methods_train_with_mixed_labels(tmp_path: Path, method, precision):
    from lightning.pytorch import Trainer

    start = True if method is PGDAT else "normal"
    module = method(SmallCNN(width=4, in_channels=1), PGD(0.1, steps=2, random_start=start))
    data = DigitsDataModule(batch_size=256, augment=list(EVERYTHING))
    before = [p.clone() for p in module.parameters()]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_steps=3, limit_val_batches=0, precision=precision, **quiet
    )
    trainer.fit(module, data)
    assert torch.isfinite(trainer.logged_metrics["train/loss"])
    assert all(not torch.equal(a, b.to(a.dtype)) for a, b in zip(before, module.parameters(), strict=True))


def test_lists_in_yaml(robust_pl, tiny: Path):
    text = "augment: [{class_path: CropAndFlip, init_args: {padding: 1, flip: false}}, {class_path: LabelSmoothing}]"
    assert "augment: true" in tiny.read_text()
    tiny.write_text(tiny.read_text().replace("augment: true", text))
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    checkpoint = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["augment"][1]["class_path"] == "robust_pl.data.LabelSmoothing"
    robust_pl("test", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")


def test_what_is_no_augmentation_is_refused():
    with pytest.raises(TypeError, match="list of augmentations"):
        DigitsDataModule(augment=[F.relu])


# Positions without a list of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000])
def test_permuted_is_a_permutation(n):
    for seed in range(3):
        assert torch.equal(permuted(torch.arange(n), n, 5, seed).sort().values, torch.arange(n))
    part = permuted(torch.arange(n)[n // 3 :], n, 5, 0)
    assert torch.equal(part, permuted(torch.arange(n), n, 5, 0)[n // 3 :])


def test_permuted_is_even():
    """Where position 0 goes over many keys, and where neighbours go among ten millions."""
    counts = torch.bincount(permuted(torch.zeros(20_000, dtype=torch.int64), 10, torch.arange(20_000)), minlength=10)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # chi squared, 9 degrees of freedom, p = 0.001
    far = permuted(torch.arange(50_000), 10_000_000, 1)
    assert len(far.unique()) == 50_000 and int(far.max()) < 10_000_000
    counts = torch.histc(far.double(), 20, 0, 10_000_000)
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 43.8
    assert abs(float(torch.corrcoef(torch.stack([far[1:], far[:-1]]).double())[0, 1])) < 0.02
