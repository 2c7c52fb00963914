"""Critical-band masking: the pyramid, the fit of a known channel, and a network that sees one band alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_pl.callbacks import CriticalBandMasking
from robust_pl.data.label_maps import sixteen_classes
from robust_pl.functional.bands import (
    Channel,
    add_inside,
    band_centres,
    band_count,
    band_noise,
    fit_channel,
    low_contrast_grey,
    octave_bands,
    thresholds,
)
from robust_pl.functional.spectra import amplitude, low_pass, radii


def noise(n: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width", "bands"), [(32, 32, 5), (30, 45, 4), (8, 8, 3)])
def test_bands_sum_to_the_image_and_rise_by_octaves(height: int, width: int, bands: int) -> None:
    assert band_count(height, width) == bands
    x = torch.randn(4, 2, height, width, generator=torch.Generator().manual_seed(0))
    levels = octave_bands(x, bands)
    assert levels.shape == (bands, *x.shape) and torch.allclose(levels.sum(0), x, atol=1e-5)
    power = amplitude(levels).square().mean((1, 2))
    centroids = ((power * radii(height, width)).sum((1, 2)) / power.sum((1, 2))).tolist()
    ratios = [b / a for a, b in pairwise(centroids[1:])]
    assert all(1.4 < ratio < 4 for ratio in ratios), centroids


def test_bands_of_the_paper_and_a_constant() -> None:
    assert band_count(224, 224) == 7
    assert band_centres(224, 224, 7) == [1.75, 3.5, 7, 14, 28, 56, 112]
    levels = octave_bands(torch.full((1, 1, 16, 16), 0.7), 4)
    assert torch.allclose(levels[0], torch.full_like(levels[0], 0.7), atol=1e-6) and levels[1:].abs().max() < 1e-6
    with pytest.raises(ValueError, match="bands=5 need images of 32 x 32 or more, not 16 x 16"):
        octave_bands(noise(1, 16), 5)


def test_pyramid_against_one_worked_out_by_hand() -> None:
    # One row of 4 pixels, 2 bands: reflected edges, taps (1, 4, 6, 4, 1) / 16, every second pixel, and back.
    line = [1.0, 0.0, 0.0, 0.0]
    taps = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]

    def blur(values: list[float]) -> list[float]:
        n = len(values)
        at = [abs(i) if i < n else 2 * (n - 1) - i for i in range(-2, n + 2)]
        return [sum(t * values[at[i + k]] for k, t in enumerate(taps)) for i in range(n)]

    coarse = blur(line)[::2]
    back = [2 * value for value in blur([coarse[0], 0.0, coarse[1], 0.0])]
    x = torch.tensor(line).expand(1, 1, 4, 4)
    low, high = octave_bands(x, 2)
    assert torch.allclose(low[0, 0], torch.tensor(back).expand(4, 4), atol=1e-6)
    assert torch.allclose(high[0, 0], (torch.tensor(line) - torch.tensor(back)).expand(4, 4), atol=1e-6)


def test_noise_of_all_bands_has_the_root_mean_square_of_the_highest() -> None:
    whole = noise(3, 32)
    levels = band_noise(whole, 5)
    rms = levels.square().mean((2, 3, 4)).sqrt()
    assert torch.allclose(rms, rms[-1:].expand_as(rms), rtol=1e-5)
    assert torch.equal(levels[-1], octave_bands(whole, 5)[-1])


def test_grey_of_low_contrast_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).expand(1, 3, 2, 2)
    assert torch.allclose(low_contrast_grey(x, 0.2, 0.449), torch.tensor([[[[0.349, 0.549], [0.449, 0.449]]]]), atol=1e-6)
    red = torch.zeros(1, 3, 1, 2)
    red[0, 0, 0, 1] = 1
    assert torch.allclose(low_contrast_grey(red, 1.0, 0.5).diff(), torch.tensor([0.299]), atol=1e-6)
    with pytest.raises(ValueError, match="images of 2 channels have no grey version"):
        low_contrast_grey(torch.rand(1, 2, 4, 4), 0.2, 0.4)


def test_sum_stays_inside_by_moving_the_image() -> None:
    image, added = torch.full((5,), 0.4), torch.tensor([0.3, -0.5, 0.8, -0.95, 0.95])
    # 0.7 stays; -0.1 and 1.2 come 0.1 inside; beyond +-0.9 no image could do that.
    assert torch.allclose(add_inside(image, added, 0.1), torch.tensor([0.7, 0.1, 0.9, 0.0, 1.0]))


def test_thresholds_count_from_the_strongest_noise() -> None:
    accuracy = torch.tensor([[0.9, 0.4, 0.9, 0.1], [0.6, 0.4, 0.9, 0.1], [0.4, 0.9, 0.9, 0.1], [0.3, 0.2, 0.51, 0.5]])
    assert thresholds(accuracy, 0.5).tolist() == [2, 1, 0, 4]


@pytest.mark.parametrize(
    ("amplitude_", "centre", "width"), [(3.5, 2.2, 1.1), (4.0, 4.0, 0.6), (2.0, 1.0, 2.0), (1.0, 6.0, 0.7)]
)
def test_fit_recovers_a_gaussian(amplitude_: float, centre: float, width: float) -> None:
    truth = Channel(amplitude_, centre, width, 4)
    found = fit_channel(torch.tensor([truth.at(band) for band in range(7)]), 4)
    assert (found.amplitude, found.centre, found.width) == pytest.approx((amplitude_, centre, width), abs=0.01)
    assert found.bandwidth == pytest.approx(2 * math.sqrt(2 * math.log(2)) * width, abs=0.02)
    assert found.peak_sensitivity == pytest.approx(2 ** (amplitude_ - 4), rel=0.01)
    # Half of the maximum is half of the bandwidth away.
    assert truth.at(centre + truth.bandwidth / 2) == pytest.approx(amplitude_ / 2)


def test_nothing_is_fitted_to_thresholds_that_say_nothing() -> None:
    assert fit_channel(torch.tensor([0, 0, 0, 0]), 4) is None
    assert fit_channel(torch.tensor([4, 4, 4]), 4) is None
    assert fit_channel(torch.tensor([0, 4]), 4) is None


class SeesOneBand(nn.Module):
    """Two classes by the sign of a wave of 4 cycles; noise of 3 to 6 cycles makes it say the other one."""

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern(side))

    def forward(self, x: Tensor) -> Tensor:
        band = low_pass(x.mean(1, keepdim=True), 13) - low_pass(x.mean(1, keepdim=True), 5)
        found = (band * self.pattern).sum((1, 2, 3)) / self.pattern.square().sum()
        rest = (band - found.view(-1, 1, 1, 1) * self.pattern).square().mean((1, 2, 3)).sqrt()
        score = torch.stack([-found, found], 1)
        return torch.where((rest > 0.02)[:, None], score.flip(1), score)


def pattern(side: int) -> Tensor:
    return (2 * math.pi * 4 * torch.arange(side) / side).cos().expand(1, 1, side, side).contiguous()


def two_classes(n: int = 12) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 2
    return (0.5 + 0.2 * (2 * y - 1).view(-1, 1, 1, 1) * pattern(32)).expand(n, 3, 32, 32).contiguous(), y


def batches(x: Tensor, y: Tensor, sizes: list[int]) -> list[Any]:
    return list(zip(x.split(sizes), y.split(sizes), torch.arange(len(x)).split(sizes), strict=True))


def test_masking_finds_the_band_that_a_network_sees() -> None:
    x, y = two_classes()
    record = CriticalBandMasking()(SeesOneBand(), batches(x, y, [12]))
    assert record.figures["quiet"] == record.figures["original"] == 1
    counts = record.lines[0].lines["measured"]
    assert record.maps[0].x == ["1", "2", "4", "8", "16"] and counts[3] == max(counts) > counts[0], counts
    # The noise of a band lies around half of the frequency that the paper calls its centre.
    assert 5 < record.figures["centre"] < 12 and 0 < record.figures["bandwidth"] < 5
    assert record.about["forwards_per_sample"] == 4 * 5 + 2
    assert record.sheets[0].rows[3][1:] == record.maps[0].values[3]


def test_masking_does_not_depend_on_the_batch_and_says_where_it_fits_nothing() -> None:
    x, y = two_classes()
    one = CriticalBandMasking(noise=(0.04, 0.08))(SeesOneBand(), batches(x, y, [12]))
    other = CriticalBandMasking(noise=(0.04, 0.08))(SeesOneBand(), list(reversed(batches(x, y, [5, 4, 3]))))
    assert one.figures == other.figures and one.maps == other.maps
    blind = CriticalBandMasking(noise=(1e-6,))(SeesOneBand(), batches(x, y, [12]))
    assert "bandwidth" not in blind.figures and "no band fails" in blind.notes[1]
    wrong = CriticalBandMasking(noise=(1e-6,))(SeesOneBand(), batches(x, 1 - y, [12]))
    assert "bandwidth" not in wrong.figures and "all levels fail in all bands" in wrong.notes[1]


class Thousand(nn.Module):
    """Of ImageNet's 1,000 classes it gives dogs, or cats, much to one member or little to each."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 1000)
        logits[:, sixteen_classes()["cat"]] = 2.0
        logits[:, sixteen_classes()["dog"][0]] = 2.5
        return logits


def test_sixteen_classes_of_imagenet() -> None:
    cats, dogs = (sixteen_classes()[name] for name in ("cat", "dog"))
    none = next(label for label in range(1000) if all(label not in of for of in sixteen_classes().values()))
    x, y = torch.rand(6, 3, 8, 8), torch.tensor([cats[0], none, cats[1], dogs[0], none, dogs[1]])
    record = CriticalBandMasking(noise=(0.1,), sixteen=True)(Thousand(), batches(x, y, [2, 4]))
    # The largest logit is a dog's, but the mean over all cats is higher than that over all dogs.
    assert record.figures["original"] == record.figures["quiet"] == 0.5
    assert record.about["images"] == 4 and record.about["classes"] == "sixteen"
    assert CriticalBandMasking(noise=(0.1,))(Thousand(), batches(x, y, [6])).figures["original"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="no image is of one of the sixteen classes"):
        CriticalBandMasking(sixteen=True)(Thousand(), batches(x[:1], y[1:2], [1]))
    with pytest.raises(ValueError, match="sixteen=True needs the logits of ImageNet's 1000 classes and the network gives 2"):
        CriticalBandMasking(sixteen=True)(SeesOneBand(), batches(torch.rand(6, 3, 32, 32), y, [6]))
    with pytest.raises(ValueError, match="sixteen=True needs labels of ImageNet's 1000 classes and there is 1000"):
        CriticalBandMasking(sixteen=True)(Thousand(), batches(x[:1], torch.tensor([1000]), [1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CriticalBandMasking(noise=(0.1, 0.3)), "must begin above 0 and double"),
        (lambda: CriticalBandMasking(noise=()), "must begin above 0 and double"),
        (lambda: CriticalBandMasking(contrast=0), "contrast=0 must lie between 0 and 1"),
        (lambda: CriticalBandMasking(criterion=1.0), "criterion=1.0 must lie between 0 and 1"),
        (lambda: CriticalBandMasking(margin=0.5), r"margin=0.5 must lie in \[0, 0.5\)"),
        (lambda: CriticalBandMasking(bands=2), "bands=2 are too few for a Gaussian"),
        (
            lambda: CriticalBandMasking(bands=6)(SeesOneBand(), batches(*two_classes(2), [2])),
            "bands=6 need images of 64 pixels",
        ),
        (
            lambda: CriticalBandMasking()(SeesOneBand(), batches(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), [2])),
            "bands=2 need",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
