"""AugMix's operations against Pillow, and its mixed chains: numbers by hand, keys, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from robust_pl.data import Augmentation, AugMixChains, AugMixOperation, CropAndFlip, CutMix, MixedChains
from robust_pl.data.augmix import ALL_OPERATIONS, OPERATIONS, operate
from robust_pl.data.beta import Beta, Dirichlet
from robust_pl.data.hashing import hash_keys, integers, uniform
from robust_pl.data.mixed_chains import mixed

from .test_prime import for_floats


def batch(count: int = 12, size: int = 16, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels of 8 bits, labels, keys."""
    x = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(1)) / 255
    return x, torch.arange(count) % 5, hash_keys(7, torch.arange(count))


class Halved(Augmentation):
    """An operation that leaves no doubt how often it was done."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x, y, keys):
        self.sizes.append(len(x))
        return x / 2, y


# Operations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_OPERATIONS)
def test_operations_are_those_of_pillow(name):
    """Exactly, but for geometry at angles, where float32 coordinates round a percent of the pixels to the next level."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(20, 230, (24, 3, 32, 24), generator=generator).float()
    levels[::3] = torch.nn.functional.avg_pool2d(levels[::3], 5, 1, 2).round()
    levels[5], levels[7, 1] = 77, 13  # of one colour, and one channel so
    level = 0.1 + 9.9 * torch.rand(24, generator=generator, dtype=torch.float64)
    sign = 1 - 2 * torch.randint(0, 2, (24,), generator=generator)
    chosen = torch.full((24,), ALL_OPERATIONS.index(name))
    if name in OPERATIONS:
        ours = operate(levels, chosen, level, sign)
    else:
        keys = hash_keys(torch.arange(4000))
        keys = keys[integers(keys, 0, len(ALL_OPERATIONS)) == ALL_OPERATIONS.index(name)][:24]
        level = 0.1 + 9.9 * uniform(keys, 1)
        ours = AugMixOperation(10, all_ops=True)(levels / 255, level, keys)[0] * 255
    theirs = torch.stack([of_pillow(name, *one) for one in zip(levels, level.tolist(), sign.tolist(), strict=True)])
    difference = (ours - theirs).abs()
    if name in ("rotate", "shear_x", "shear_y"):
        assert float(difference.max()) <= 1 and float((difference > 0).float().mean()) < 0.02
    else:
        assert float(difference.max()) < 1e-3
    assert not torch.equal(theirs, levels)


def of_pillow(name: str, levels: torch.Tensor, level: float, sign: int) -> torch.Tensor:
    """The authors' operations, with the image's size for theirs."""
    image = Image.fromarray(levels.permute(1, 2, 0).numpy().astype(np.uint8))
    width, height = image.size
    shear = sign * level * 0.3 / 10
    matrices = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, sign * int(level * (width / 3) / 10), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(level * (height / 3) / 10)),
    }
    if name in matrices:
        image = image.transform(image.size, Image.Transform.AFFINE, matrices[name], resample=Image.Resampling.BILINEAR)
    elif name == "rotate":
        image = image.rotate(sign * int(level * 30 / 10), resample=Image.Resampling.BILINEAR)
    elif name == "posterize":
        image = ImageOps.posterize(image, 4 - int(level * 4 / 10))
    elif name == "solarize":
        image = ImageOps.solarize(image, 256 - int(level * 256 / 10))
    elif hasattr(ImageOps, name):
        image = getattr(ImageOps, name)(image)
    else:
        image = getattr(ImageEnhance, name.title())(image).enhance(level * 1.8 / 10 + 0.1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_what_severity_3_reaches():
    """At most 8 degrees, shears of 0.09, and 3 pixels of 32; levels from 180 on are inverted; 3 bits stay."""
    keys = hash_keys(torch.arange(3000))
    level = 0.1 + 2.9 * uniform(keys, 1)
    assert int((level * 3).long().max()) == 8 and float((0.03 * level).max()) < 0.09
    ramp = (torch.arange(256.0) / 255).view(1, 1, 16, 16).expand(3000, 1, 16, 16)
    out, _ = AugMixOperation(3)(ramp, keys, keys)
    chosen = integers(keys, 0, 9)
    assert set(chosen.tolist()) == set(range(9))
    solarized = out[chosen == OPERATIONS.index("solarize")]
    assert torch.equal(solarized.flatten(1)[:, :180], ramp[: len(solarized)].flatten(1)[:, :180])
    assert {len(one.unique()) for one in out[chosen == OPERATIONS.index("posterize")]} == {8, 16}
    moved = out[chosen == OPERATIONS.index("translate_y")] * 255  # rows of 16 levels
    assert {int(one[8, 8]) // 16 - 8 for one in moved[:, 0]} == {-1, 0, 1}  # int(3 * 16 / 30)


def test_operations_draw_by_key_and_keep_type_and_shape():
    x, y, keys = batch(200)
    out, same = AugMixOperation(3)(x, y, keys)
    assert same is y and torch.equal(out[50:70], AugMixOperation(3)(x[50:70], y[50:70], keys[50:70])[0])
    assert out.min() >= 0 and out.max() <= 1 and torch.equal((out * 255).round() / 255, out)
    for_floats(lambda: AugMixOperation(3)(x, y, keys)[0], out)
    grey = x[:, :1].double()
    assert AugMixOperation(3, all_ops=True)(grey, y, keys)[0].dtype == torch.float64


# The mixture ---------------------------------------------------------------------------------------------------------


def test_mixed_by_hand():
    x, chains = torch.full((2, 1, 1, 1), 0.5), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]).view(3, 2, 1, 1, 1)
    w, m = torch.tensor([[0.2, 0.5], [0.3, 0.25], [0.5, 0.25]]), torch.tensor([0.4, 0.0])
    # 0.6 * 0.5 + 0.4 * (0.3 + 0.25); without a share of the chains the image itself
    assert torch.allclose(mixed(x, chains, w, m).flatten(), torch.tensor([0.52, 0.5]))


@pytest.mark.parametrize(("alpha", "width"), [(1.0, 3), (0.5, 3), (2.0, 5), (1.0, 1)])
def test_weights_are_dirichlet_and_beta(alpha, width):
    w, m = AugMixChains(alpha=alpha, width=width).weights(hash_keys(1, torch.arange(20_000)))
    assert w.shape == (width, 20_000) and w.min() >= 0 and m.min() >= 0 and m.max() <= 1
    assert torch.allclose(w.sum(0), torch.ones(20_000, dtype=torch.float64))
    variance = (width - 1) / (width**2 * (width * alpha + 1))
    assert torch.allclose(w.mean(1), torch.full((width,), 1 / width, dtype=torch.float64), atol=0.01)
    assert torch.allclose(w.var(1), torch.full((width,), variance, dtype=torch.float64), atol=0.05 * variance + 1e-9)
    assert abs(float(m.mean()) - 0.5) < 0.01 and abs(float(m.var()) * 4 * (2 * alpha + 1) - 1) < 0.05


def test_beta_and_dirichlet_of_uniform_numbers():
    u = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Beta(1, 1)(u), u, atol=1e-12)
    assert torch.allclose(Beta(1, 2)(u), 1 - (1 - u).sqrt(), atol=2e-3)
    keys = hash_keys(torch.arange(5))
    shares = Dirichlet(1, 2)(keys, 4)
    assert torch.allclose(shares[0], uniform(keys, 4), atol=1e-12) and torch.allclose(shares.sum(0), torch.ones(5).double())


@pytest.mark.parametrize("depth", [None, 1, 4])
def test_chains_have_the_depth_that_was_asked_for(depth):
    x, y, keys = torch.ones(400, 1, 1, 1), torch.arange(400), hash_keys(torch.arange(400))
    operation = Halved()
    chains = MixedChains([operation, operation], width=2, depth=depth).chains(x, y, keys)
    assert chains.shape == (2, 400, 1, 1, 1)
    done = -chains.log2().flatten()
    if depth is not None:
        assert (done == depth).all()
        return
    counts = torch.bincount(done.long(), minlength=4)
    assert counts[0] == 0 and (counts[1:] - 800 / 3).abs().max() < 60
    assert sum(operation.sizes) == int(done.sum())  # nothing is computed that no sample drew


def test_a_view_depends_on_its_key_alone():
    x, y, keys = batch(100)
    chains = AugMixChains(3)
    out, same = chains(x, y, keys)
    assert same is y and out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.allclose(out[30:50], chains(x[30:50], y[30:50], keys[30:50])[0], atol=1e-6)
    other, _ = chains(x, y, hash_keys(8, torch.arange(100)))
    assert (out != other).flatten(1).any(1).all()
    w, m = chains.weights(keys)
    assert torch.allclose(out, mixed(x, chains.chains(x, y, keys), w.float(), m.float()))
    assert chains(x[:, :1].double(), y, keys)[0].dtype == torch.float64
    for_floats(lambda: chains(x, y, keys)[0], out)


def test_on_a_device_every_operation_runs_on_the_whole_batch(monkeypatch):
    """The way without waiting gives the same pixels."""
    from robust_pl.data import mixed_chains

    x, y, keys = batch(40)
    chains = MixedChains([AugMixOperation(3), CropAndFlip(2)])
    expected = chains.chains(x, y, keys)

    def everywhere(rows, operation, before, out, y, keys):
        return torch.where(rows.view(-1, 1, 1, 1), operation(before, y, keys)[0], out)

    monkeypatch.setattr(mixed_chains, "_where", everywhere)
    assert torch.equal(chains.chains(x, y, keys), expected)
    nowhere = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    assert AugMixChains(all_ops=True)(*nowhere, nowhere[1])[0].device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugMixOperation(0), "severity=0"),
        (lambda: AugMixChains(11), "severity=11"),
        (lambda: AugMixChains(width=0), "width=0"),
        (lambda: AugMixChains(depth=0), "depth=0"),
        (lambda: AugMixChains(alpha=0), "alpha=0"),
        (lambda: MixedChains([]), "operations is empty"),
        (lambda: MixedChains([CutMix()]), "CutMix mixes labels"),
        (lambda: AugMixOperation(all_ops=True)(*batch(channels=4)), "1 or 3 channels, not 4"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
