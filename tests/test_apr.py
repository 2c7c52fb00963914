"""Amplitude-phase recombination: of whose spectrum what is taken, coins, and what leaves the range."""

from __future__ import annotations

import pytest
import torch

from robust_pl.data import APRPair, APRSingle, AugMixOperation
from robust_pl.data.augmentations import partners
from robust_pl.data.hashing import hash_keys, uniform
from robust_pl.functional.recombination import recombined

from .test_prime import for_floats


def batch(count: int = 12, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)) / 255
    return x, torch.arange(count) % 5, hash_keys(7, torch.arange(count))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 7, 9), (1, 8, 5)])
def test_amplitudes_of_one_and_phases_of_the_other(shape):
    a, b = torch.rand(2, 4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = recombined(a, b)
    spectrum, of, to = (torch.fft.fftn(x, dim=(1, 2, 3)) for x in (out, a, b))
    assert torch.allclose(spectrum.abs(), of.abs(), atol=1e-10)
    assert torch.allclose(spectrum, of.abs() * to / to.abs(), atol=1e-10)
    whole = torch.fft.ifftn(of.abs() * torch.exp(1j * to.angle()), dim=(1, 2, 3))
    assert float(whole.imag.abs().max()) < 1e-12 and torch.allclose(whole.real, out)
    assert torch.allclose(recombined(a.float(), a.float()), a.float(), atol=1e-5)
    assert recombined(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


def test_channels_are_transformed_together():
    a, b = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([recombined(a[:, c : c + 1], b[:, c : c + 1]) for c in range(3)], 1)
    assert float((recombined(a, b) - alone).abs().max()) > 0.1


def test_pairs():
    x, y, keys = batch(40)
    out, same = APRPair(1.0, overflow="keep")(x, y, keys)
    assert same is y and torch.equal(out, recombined(x[partners(keys, 1)], x))
    assert out.min() < 0 and out.max() > 1  # as in the authors' code
    clipped, _ = APRPair(1.0)(x, y, keys)
    assert torch.equal(clipped, out.clamp(0, 1))
    assert APRPair(0.0)(x, y, keys)[0] is x
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(APRPair(0.5)(x[order], y[order], keys[order])[0], APRPair(0.5)(x, y, keys)[0][order], atol=1e-6)
    alone, _ = APRPair(1.0)(x[:1], y[:1], keys[:1])
    assert torch.allclose(alone, x[:1], atol=1e-6)


def test_one_coin_for_the_batch_or_one_for_each_sample():
    x, y, _ = batch(16, 8)
    shares = {"batch": [], "sample": []}
    for seed in range(200):
        keys = hash_keys(seed, torch.arange(16))
        for coin, seen in shares.items():
            seen.append(float((APRPair(0.6, coin)(x, y, keys)[0] != x).flatten(1).any(1).float().mean()))
    assert set(shares["batch"]) == {0.0, 1.0} and abs(sum(shares["batch"]) / 200 - 0.6) < 0.1
    assert min(shares["sample"]) > 0 and max(shares["sample"]) < 1 and abs(sum(shares["sample"]) / 200 - 0.6) < 0.03


def test_single_images():
    """Each of the four outcomes by hand, an eighth to a half of the samples each."""
    x, y, keys = batch(400)
    operation = AugMixOperation(3)
    once, _ = operation(x, y, hash_keys(keys, 1000))
    twice, _ = operation(once, y, hash_keys(keys, 1001))
    out, same = APRSingle(0.75)(x, y, keys)
    assert same is y and torch.equal((out * 255).round() / 255, out)
    changed, second, reverse = uniform(keys, 0) < 0.75, uniform(keys, 2) < 0.5, uniform(keys, 3) < 0.5
    assert torch.equal(out[~changed], x[~changed]) and 60 < int((~changed).sum()) < 140
    assert torch.equal(out[changed & ~second], once[changed & ~second])
    for rows, (a, b) in ((~reverse, (once, twice)), (reverse, (twice, once))):
        rows = rows & changed & second
        assert 30 < int(rows.sum()) < 120
        level = recombined(a[rows].double(), b[rows].double()) * 255
        assert float((out[rows] * 255 - level.clamp(0, 255)).abs().max()) <= 1.001  # cut off, not rounded
        assert float((out[rows] * 255 - level.clamp(0, 255)).mean()) < -0.2
    assert torch.equal(out[5:9], APRSingle(0.75)(x[5:9], y[5:9], keys[5:9])[0])


def test_what_leaves_the_range_is_cut_off_or_wrapped():
    x, y, keys = batch(200)
    clipped, wrapped = APRSingle()(x, y, keys)[0], APRSingle(overflow="wrap")(x, y, keys)[0]
    different = clipped != wrapped
    assert 0.01 < float(different.float().mean()) < 0.3
    assert set(clipped[different].tolist()) == {0.0, 1.0}
    assert wrapped.min() >= 0 and wrapped.max() <= 1
    assert float(wrapped[different & (clipped == 0)].median()) > 0.5 > float(wrapped[different & (clipped == 1)].median())


@pytest.mark.parametrize("make", [APRPair, APRSingle])
def test_types_and_devices(make):
    x, y, keys = batch(6)
    out, _ = make(1.0)(x, y, keys)
    assert make(1.0)(x.double(), y, keys)[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(1.0)(x, y, keys)[0], out)
    for_floats(lambda: make(1.0)(x, y, keys)[0], out)
    nowhere = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    assert make()(*nowhere, nowhere[1])[0].device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APRPair(1.5), "probability=1.5"),
        (lambda: APRPair(coin="image"), "batch or sample"),
        (lambda: APRPair(overflow="wrap"), "clip or keep"),
        (lambda: APRSingle(-1), "probability=-1"),
        (lambda: APRSingle(overflow="keep"), "clip or wrap"),
        (lambda: APRSingle(severity=20), "severity=20"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
