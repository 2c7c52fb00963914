"""PRIME's primitives: their laws, by hand and against direct sums, and what they leave as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from robust_pl.data import PRIME, CropAndFlip, Diffeomorphism, RandomFilter, SmoothColor
from robust_pl.data.diffeomorphism import variances
from robust_pl.data.hashing import hash_keys, normal
from robust_pl.data.mixed_chains import mixed


def batch(count: int = 12, size: int = 16, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 5, hash_keys(7, torch.arange(count))


def for_floats(act: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    """The same whatever the run calls a float: Lightning's true precisions change that."""
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.allclose(act(), expected, atol=1e-5)
        finally:
            torch.set_default_dtype(torch.float32)


def test_normal_numbers():
    z = normal(hash_keys(3, torch.arange(50)).unsqueeze(1), torch.arange(2000)).double()
    moments = torch.stack([z.mean(), z.square().mean(), z.pow(3).mean(), z.pow(4).mean()])
    assert torch.allclose(moments, torch.tensor([0.0, 1.0, 0.0, 3.0]).double(), atol=0.08) and z.isfinite().all()


# Deformations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [2, 3, 9, 21])
def test_sines_that_a_grid_cannot_tell_apart_are_drawn_as_one(cut):
    """The covariance of the field between points of a small grid is that of the sum over all frequencies."""
    n, points = 9, [(1, 2), (3, 4), (5, 1), (4, 4)]
    table, inner = variances(21, n)[cut].double(), torch.arange(1, n - 1).double()

    def sines(frequency: torch.Tensor, point: tuple[int, int]) -> torch.Tensor:
        return torch.outer(*(torch.sin(math.pi * frequency * p / (n - 1)) for p in point))

    every = torch.arange(1, cut + 1).double()
    square = every.unsqueeze(1) ** 2 + every**2
    weight = (square.sqrt() < cut + 0.5) / square
    for p in points:
        for q in points:
            expected = (weight * sines(every, p) * sines(every, q)).sum()
            assert abs(float((table * sines(inner, p) * sines(inner, q)).sum() - expected)) < 1e-6


def test_the_law_of_cuts_and_temperatures():
    cut, temperature = Diffeomorphism(100).law(hash_keys(torch.arange(20_000)), 32)
    assert int(cut.min()) == 2 and 90 < int(cut.max()) <= 100
    # Half a pixel is 1 / (pi n^2 log c); images fold from 4 / (pi^3 c^2 log c) on, which is less from c = 21 on.
    half = 1 / (math.pi * 32**2 * cut.double().log())
    fold = 4 / (math.pi**3 * cut.double() ** 2 * cut.double().log())
    assert (temperature >= half * 0.999999).all() and (temperature <= half.maximum(fold) * 1.000001).all()
    assert torch.allclose(temperature[cut >= 21], half[cut >= 21]) and (temperature[cut == 2] > 1.5 * half[cut == 2]).any()
    # The arcsine distribution: a fifth of its numbers are below 0.0955.
    share = ((temperature - half) / (fold - half))[cut == 2]
    assert abs(float((share < 0.0955).double().mean()) - 0.2) < 0.02


def test_displacements_have_the_size_that_the_law_gives_them():
    operation, n, keys = Diffeomorphism(10), 16, hash_keys(torch.arange(4000))
    cut, temperature = operation.law(keys, n)
    moved = operation.displacement(keys, n)
    assert moved.shape == (4000, 2, n, n)
    edges = torch.cat([moved[:, :, 0], moved[:, :, -1], moved[..., 0], moved[..., -1]])
    assert float(edges.abs().max()) < 1e-4  # the sine of a multiple of pi
    inner = torch.arange(1, n - 1).double()
    waves = torch.sin(math.pi * inner.unsqueeze(1) * torch.arange(n) / (n - 1)).square().mean(1)
    expected = n**2 * (variances(10, n)[cut].double() * torch.outer(waves, waves)).sum((1, 2)) * temperature
    ratio = moved.double().square().mean((2, 3)) / expected.unsqueeze(1)
    assert abs(float(ratio.mean()) - 1) < 0.03


def test_a_deformation_moves_pixels_where_the_field_says():
    operation, keys = Diffeomorphism(4), hash_keys(torch.arange(30))
    n = 24
    ramps = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).float() / (n - 1)
    out, _ = operation(ramps.expand(30, 2, n, n), keys, keys)
    right, down = operation.displacement(keys, n).unbind(1)
    place = torch.arange(n).float()
    expected = torch.stack([(place.unsqueeze(1) - down).clamp(0, n - 1), (place - right).clamp(0, n - 1)], 1) / (n - 1)
    assert torch.allclose(out, expected, atol=1e-5)
    assert 0.2 < float(right.abs().mean()) < 5
    flat = torch.full((30, 3, n, n), 0.4)
    assert torch.allclose(operation(flat, keys, keys)[0], flat)


# Colours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [None, 3])
def test_curves_of_colour_are_sums_of_sines(bandwidth):
    x, y, keys = batch(60)
    operation = SmoothColor(12, 0.02, bandwidth)
    beta = operation.coefficients(keys, 3).double()
    k = torch.arange(1, 13)
    waves = torch.sin(math.pi * k * x.double().unsqueeze(-1))
    expected = (x + (beta.view(60, 3, 1, 1, 12) * waves).sum(-1)).clamp(0, 1)
    out, same = operation(x, y, keys)
    assert same is y and float((out - expected).abs().max()) < 3e-3
    ends = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(60, 3, 1, 2)
    assert torch.allclose(operation(ends, y, keys)[0], ends, atol=1e-5)
    used = (beta[:, 0] != 0).sum(1)
    assert int(used.max()) == (12 if bandwidth is None else 3) and int(used.min()) >= 1
    first = (beta[:, 0] != 0).int().argmax(1)
    assert (first == 0).all() if bandwidth is None else int(first.max()) > 5
    assert torch.equal(SmoothColor(12, 0.0, bandwidth)(x, y, keys)[0], x)


def test_coefficients_of_colour_have_the_variance_of_their_temperature():
    beta = SmoothColor(1, 0.01).coefficients(hash_keys(torch.arange(20_000)), 3).double()  # one frequency: always used
    assert abs(float(beta.square().mean()) / 0.005 - 1) < 0.03  # T is 0.005 on average
    assert abs(float((beta[:, 0] * beta[:, 1]).mean())) < 1e-4


# Filters -------------------------------------------------------------------------------------------------------------


def test_without_noise_a_filter_is_the_identity_or_the_authors_shift():
    x, y, keys = batch(5)
    assert torch.equal(RandomFilter(0, centered=True)(x, y, keys)[0], x)
    shifted, _ = RandomFilter(0)(x, y, keys)
    assert torch.equal(shifted[:, :, :-1, :-1], x[:, :, 1:, 1:])
    assert shifted[:, :, -1].eq(0).all() and shifted[:, :, :, -1].eq(0).all()


@pytest.mark.parametrize("size", [3, 5])
def test_filters_are_convolutions_with_taps_of_their_own(size):
    x, y, keys = batch(6)
    operation = RandomFilter(0.2, size)
    taps = operation.taps(keys).view(6, 1, size, size)
    expected = torch.nn.functional.conv2d(x.transpose(0, 1), taps, padding=size // 2, groups=6).transpose(0, 1)
    assert torch.allclose(operation(x, y, keys)[0], expected.clamp(0, 1), atol=1e-5)
    many = RandomFilter(4, 3, centered=True).taps(hash_keys(torch.arange(20_000))).double()
    assert abs(float(many[:, 4].mean()) - 1) < 0.06 and abs(float(many[:, 8].mean())) < 0.06
    assert abs(float(many[:, 0].var()) / (16 / 3) - 1) < 0.05  # sigma ~ U(0, 4): mean of its square


# All of it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Diffeomorphism, SmoothColor, RandomFilter, PRIME], ids=lambda make: make.__name__)
def test_a_sample_depends_on_its_key_alone(make):
    x, y, keys = batch(40)
    out, same = make()(x, y, keys)
    assert same is y and out.shape == x.shape and out.min() >= 0 and out.max() <= 1 and out.isfinite().all()
    assert torch.allclose(out[10:15], make()(x[10:15], y[10:15], keys[10:15])[0], atol=1e-5)
    assert (out != make()(x, y, hash_keys(8, keys))[0]).flatten(1).any(1).all()
    assert make()(x.double(), y, keys)[0].dtype == torch.float64 and make()(x[:, :1], y, keys)[0].shape == x[:, :1].shape
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(make()(x, y, keys)[0], out, atol=1e-5)
    for_floats(lambda: make()(x, y, keys)[0], out)
    nowhere = torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    assert make()(*nowhere, nowhere[1])[0].device.type == "meta"


def test_prime_mixes_chains_of_its_primitives():
    x, y, keys = batch(40)
    prime = PRIME()
    assert [type(one) for one in prime.operations] == [Diffeomorphism, SmoothColor, RandomFilter]
    w, m = prime.weights(keys)
    assert torch.allclose(prime(x, y, keys)[0], mixed(x, prime.chains(x, y, keys), w.float(), m.float()))
    only = PRIME([CropAndFlip(0, flip=False)], width=1)  # an operation that changes nothing
    assert torch.allclose(only(x, y, keys)[0], x, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diffeomorphism(2), "cutoff=2"),
        (lambda: Diffeomorphism(strength=2), "strength=2"),
        (lambda: Diffeomorphism()(torch.rand(1, 3, 8, 9), *[torch.zeros(1, dtype=torch.int64)] * 2), r"\(3, 8, 9\)"),
        (lambda: SmoothColor(0), "cutoff=0"),
        (lambda: SmoothColor(max_temperature=-1), "max_temperature=-1"),
        (lambda: SmoothColor(bandwidth=0), "bandwidth=0"),
        (lambda: RandomFilter(-1), "max_sigma=-1"),
        (lambda: RandomFilter(size=4), "size=4"),
        (lambda: PRIME([]), "operations is empty"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
