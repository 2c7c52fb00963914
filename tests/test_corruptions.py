"""The corruptions against closed forms, Pillow, SciPy and the standard library's HSV, and what does not depend on the batch."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from robust_pl.functional.corruptions import BENCHMARK, CORRUPTIONS, EXTRA, SEVERITIES, corrupt
from robust_pl.functional.corruptions.blur import disk, scattered
from robust_pl.functional.corruptions.digital import _turned
from robust_pl.functional.corruptions.draws import Draws
from robust_pl.functional.corruptions.filters import clipped_zoom, gaussian, symmetric_filter
from robust_pl.functional.corruptions.motion import streak_taps, streaked
from robust_pl.functional.corruptions.spatter import distance, equalized, outline
from robust_pl.functional.corruptions.weather import plasma
from robust_pl.functional.hashing import hash_keys


def images(n: int = 4, size: int = 32) -> Tensor:
    """Smooth colours with edges, multiples of 1/255."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    fine[:, :, : size // 3, size // 2 :] = coarse[:, :, :1, :1]
    return (fine * 255).round() / 255


def plain(value: float, n: int = 8, size: int = 32) -> Tensor:
    return torch.full((n, 3, size, size), round(255 * value) / 255)


def levels(x: Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_fifteen_and_four() -> None:
    assert len(BENCHMARK) == 15 and len(EXTRA) == 4 and set(BENCHMARK) | set(EXTRA) == set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_result_is_that_of_the_sample_and_not_of_the_batch(name: str) -> None:
    x, index = images(5), torch.tensor([3, 90, 7, 1000, 12])
    whole = corrupt(x, name, 3, index)
    assert whole.dtype == x.dtype and whole.shape == x.shape and whole.min() >= 0 and whole.max() <= 1
    assert torch.equal((whole * 255).round() / 255, whole)
    order = torch.tensor([4, 1, 2])
    assert torch.equal(corrupt(x[order], name, 3, index[order]), whole[order])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(corrupt(last, name, 3, index), whole)
    assert not torch.equal(whole, x)
    same = torch.equal(corrupt(x, name, 3, index, seed=1), whole)
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate"}
    assert same == (name in fixed)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", (32, 224))
def test_severities_grow(name: str, size: int) -> None:
    n = 12 if size == 32 else 1
    x, index = images(n, size), torch.arange(n)
    far = [(corrupt(x, name, severity, index) - x).abs().mean().item() for severity in SEVERITIES]
    assert min(far) > 0.001
    # The benchmark's own tables do not grow everywhere: displacements get smaller and rougher, mud follows water, and so on.
    uneven = {"elastic_transform", "spatter", "saturate", "frost", "snow", "glass_blur", "fog", "motion_blur"}
    if name not in uneven:
        assert far == sorted(far), far
    assert name in ("elastic_transform", "spatter", "saturate") or far[4] > far[0]


def test_gaussian_and_speckle_noise_have_their_deviations() -> None:
    x = plain(0.5)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(x, "gaussian_noise", severity, torch.arange(8)) - x
        # Truncation takes half a level off the mean, and adds the variance of a level.
        assert noise.mean().item() == pytest.approx(-0.5 / 255, abs=4 * sigma / 24576**0.5)
        assert noise.std().item() == pytest.approx((sigma**2 + 1 / (12 * 255**2)) ** 0.5, rel=0.025)
    noise = corrupt(x, "speckle_noise", 5, torch.arange(8)) - x
    assert noise.std().item() == pytest.approx(0.2 * 128 / 255, rel=0.025)


def test_shot_noise_counts_photons() -> None:
    x = plain(0.4, size=96)
    for table, photons in (("cifar", 500), ("imagenet", 60)):
        counts = corrupt(x, "shot_noise", 1, torch.arange(8), table=table)  # type: ignore[arg-type]
        assert (counts.var() * photons / x[0, 0, 0, 0]).item() == pytest.approx(1.0, rel=0.02)
    three = corrupt(x, "shot_noise", 5, torch.arange(8), table="imagenet")  # three photons
    shares = [(three == math.floor(255 * k / 3 + 1e-6) / 255).double().mean().item() for k in (0, 1, 2)]
    assert shares == pytest.approx(stats.poisson.pmf([0, 1, 2], 3 * 102 / 255), abs=0.004)
    assert (corrupt(plain(0.0), "shot_noise", 1, torch.arange(8)) == 0).all()


def test_impulses_are_salt_and_pepper_alike() -> None:
    y = corrupt(plain(0.5), "impulse_noise", 5, torch.arange(8))
    assert [(y == value).double().mean().item() for value in (0, 1)] == pytest.approx([0.035, 0.035], abs=0.005)


def test_blurs_are_those_of_scipy() -> None:
    x = images(2).double()
    for sigma, border, truncate in (
        (0.4, "nearest", 4.0),
        (1.5, "nearest", 4.0),
        (6.4, "reflect", 3.0),
        (40.0, "reflect", 3.0),
    ):
        wanted = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=border, truncate=truncate)
        torch.testing.assert_close(gaussian(x, sigma, truncate, border), torch.from_numpy(wanted))  # type: ignore[arg-type]
    kernel = disk(3, 0.1)
    wanted = ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="mirror")
    torch.testing.assert_close(symmetric_filter(x, kernel)[0, 0], torch.from_numpy(wanted))
    for factor in (1.01, 1.2, 2.25):
        part = math.ceil(32 / factor)
        top = (32 - part) // 2
        large = ndimage.zoom(x[0, 0].numpy()[top : top + part, top : top + part], factor, order=1)
        trim = (len(large) - 32) // 2
        wanted = torch.from_numpy(large[trim : trim + 32, trim : trim + 32])
        torch.testing.assert_close(clipped_zoom(x, factor)[0, 0], wanted)


def test_kernels_sum_to_one_but_for_disks_at_the_border() -> None:
    sums = [disk(radius, edge).sum().item() for radius, edge in ((3, 0.1), (4, 0.5), (6, 0.5), (0.5, 0.6), (8, 0.5), (10, 0.5))]
    assert sums[:4] == pytest.approx([1.0] * 4)
    assert sums[4:] == pytest.approx([1.013, 1.011], abs=0.0005)
    assert sum(streak_taps(15, 12)) == pytest.approx(1.0)


def test_streaks_take_from_one_side_along_their_own_direction() -> None:
    point = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    point[:, :, 4, 4] = 1
    level, upright = streaked(point, torch.tensor([0.0, 90.0]), 2, 1.0)
    taps = [math.exp(-i * i / 2) for i in range(5)]
    wanted = torch.tensor([tap / sum(taps) for tap in reversed(taps)], dtype=torch.float64)
    torch.testing.assert_close(level[0, 4, :5], wanted)
    torch.testing.assert_close(upright[0, :5, 4], wanted)
    assert level.sum().item() == pytest.approx(1.0)


def test_glass_writes_neighbours_over_pixels_in_order() -> None:
    """The same as a loop that overwrites one pixel after the other."""
    n, delta = 12, 3
    x = torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    way = torch.randint(-delta, delta, (2, 2, n, n), generator=torch.Generator().manual_seed(1))
    wanted = x.clone()
    for b in range(2):
        for h in range(n - delta, delta, -1):
            for w in range(n - delta, delta, -1):
                wanted[b, 0, h, w] = wanted[b, 0, h + way[b, 1, h, w], w + way[b, 0, h, w]]
    assert torch.equal(scattered(x, way, delta), wanted)


def test_contrast_moves_towards_the_mean() -> None:
    x = images()
    wanted = (x.double() * 255).round() / 255
    mean = wanted.mean((2, 3), keepdim=True)
    wanted = ((mean + 0.15 * (wanted - mean)) * 255 + 1e-6).floor()
    assert torch.equal((corrupt(x, "contrast", 5, torch.arange(4)) * 255).round().double(), wanted)


def test_brightness_and_saturate_are_those_of_hsv() -> None:
    x = images(1, 16)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0.0, 1.0, 102 / 255
    brighter = corrupt(x, "brightness", 4, torch.zeros(1, dtype=torch.int64))
    redder = corrupt(x, "saturate", 5, torch.zeros(1, dtype=torch.int64))
    for pixel, bright, red in zip(*(levels(one).reshape(-1, 3) for one in (x, brighter, redder)), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        # The standard library's sectors round elsewhere; where it ends just below a level, ours is on it.
        lighter = np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1.0)))
        assert (np.floor(lighter * 255 + 1e-6) == bright).all()
        stronger = np.array(colorsys.hsv_to_rgb(h, min(s * 2.5 + 0.2, 1.0), v))
        assert (np.floor(stronger * 255 + 1e-6) == red).all()


@pytest.mark.parametrize("size", (32, 33, 224))
def test_pixelate_and_jpeg_are_those_of_pillow(size: int) -> None:
    n = 2 if size < 224 else 1
    x, table = images(n, size), "imagenet" if size == 224 else "cifar"
    scales = (0.6, 0.5, 0.4, 0.3, 0.25) if size == 224 else (0.95, 0.9, 0.85, 0.75, 0.65)
    qualities = (25, 18, 15, 10, 7) if size == 224 else (80, 65, 58, 50, 40)
    for severity, scale, quality in zip(SEVERITIES, scales, qualities, strict=True):
        coarse = levels(corrupt(x, "pixelate", severity, torch.arange(n), table=table))  # type: ignore[arg-type]
        lossy = levels(corrupt(x, "jpeg_compression", severity, torch.arange(n), table=table))  # type: ignore[arg-type]
        for i, image in enumerate(map(Image.fromarray, levels(x))):
            small = image.resize((int(size * scale), int(size * scale)), Image.Resampling.BOX)
            assert (np.asarray(small.resize((size, size), Image.Resampling.BOX)) == coarse[i]).all()
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            assert (np.asarray(Image.open(file)) == lossy[i]).all()


def test_affine_map_moves_the_corners() -> None:
    """A map that moves all three corners alike is a shift, mirrored at the border; one corner alone shears."""
    x = images(1).double()
    moved = torch.tensor([[[3.0, -2.0]] * 3], dtype=torch.float64)
    y = _turned(x, moved)
    torch.testing.assert_close(y[..., :-2, 3:], x[..., 2:, :-3])
    torch.testing.assert_close(y[..., :-2, 2], x[..., 2:, 1])  # what lies at -1 is what lies at 1
    still = _turned(x, torch.zeros(1, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(still, x)
    moved = torch.tensor([[[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(_turned(x, moved)[..., 26, 30], x[..., 26, 26])


def test_plasma_is_periodic_fractal_noise() -> None:
    draws = Draws(hash_keys(0, torch.arange(3)))
    land = plasma(draws, 32, 3.0)
    assert land.shape == (3, 32, 32)
    assert (land.amin((1, 2)) == 0).all() and (land.amax((1, 2)) == 1).all()
    smooth = (land - land.roll(1, 1)).abs().mean()
    rough = plasma(Draws(hash_keys(0, torch.arange(3))), 32, 1.5)
    assert (rough - rough.roll(1, 1)).abs().mean() > 2 * smooth


def test_parts_of_spatter() -> None:
    wet = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    wet[..., 2:7, 2:7] = True
    line = outline(wet)
    assert line.sum() == 16 and not line[0, 0, 4, 4]
    wanted = ndimage.distance_transform_edt(~line[0, 0].numpy())
    torch.testing.assert_close(distance(line, 3)[0, 0], torch.from_numpy(np.minimum(wanted, 3)))
    # Ten, twenty and ten of the values 3, 5 and 9: their places among all but the first ten, times 255.
    x = torch.tensor([3.0] * 10 + [5.0] * 20 + [9.0] * 10, dtype=torch.float64).view(1, 1, 5, 8)
    assert equalized(x).unique().tolist() == [0.0, 170.0, 255.0]
    assert torch.equal(equalized(torch.full_like(x, 7.0)), torch.full_like(x, 7.0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "rain"}, "corruption 'rain' is unknown: choose among gaussian_noise"),
        ({"severity": 6}, "severity=6 must be one of 1, 2, 3, 4, 5"),
        ({"table": "mnist"}, "table='mnist' is unknown"),
        ({"x": torch.zeros(2, 1, 28, 28)}, "need colour images"),
        ({"x": torch.zeros(2, 3, 4, 4)}, "at least 8 x 8 pixels"),
        ({"x": 2 * torch.ones(2, 3, 32, 32)}, r"outside \[0, 1\]"),
        ({"index": torch.arange(3)}, "index must hold the position of each of 2 images"),
    ],
)
def test_bad_input(change: dict[str, object], sentence: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 32, 32), "name": "fog", "severity": 1, "index": torch.arange(2), **change}
    with pytest.raises(ValueError, match=sentence):
        corrupt(**arguments)  # type: ignore[arg-type]
