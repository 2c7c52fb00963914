"""The frequency view: transforms against closed forms, analyses of networks whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_pl.callbacks import PGD, UAP, FourierHeatMap, FrequencyFilter, PerturbationSpectrum
from robust_pl.functional.fourier_basis import directions, fourier_basis
from robust_pl.functional.spectra import (
    amplitude,
    frequencies,
    high_pass,
    kernel_roughness,
    low_pass,
    mirrored,
    radial_shares,
    radial_sums,
    radii,
    window,
    window_share,
)
from robust_pl.nets import SmallCNN
from robust_pl.report import Record

from .conftest import CONFIGS


def images(n: int = 6, channels: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def wave(u: int, v: int, height: int = 16, width: int = 16) -> Tensor:
    i, j = torch.arange(height).double()[:, None], torch.arange(width).double()[None, :]
    return (2 * math.pi * (u * i / height + v * j / width) + 0.3).cos()


def batches(x: Tensor, y: Tensor, sizes: list[int]) -> list[Any]:
    return list(zip(x.split(sizes), y.split(sizes), torch.arange(len(x)).split(sizes), strict=True))


def test_frequencies_are_those_of_the_transform() -> None:
    for n in (7, 8):
        assert frequencies(n).tolist() == (torch.fft.fftfreq(n) * n).round().long().tolist()


def test_a_wave_lies_in_its_two_bins() -> None:
    found = amplitude(wave(3, -2))
    # Each bin holds half of the amplitude times the number of pixels.
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[8 + 3, 8 - 2] = expected[8 - 3, 8 + 2] = 128
    assert torch.allclose(found, expected, atol=1e-9)
    assert radial_shares(found.square())[round(math.hypot(3, 2))].item() == pytest.approx(1)
    for size, share in ((6, 0.5), (7, 1.0), (5, 0.0)):  # of 6 bins, -3 ... 2, the window holds one bin of the pair
        assert window_share(found.square(), size).item() == pytest.approx(share, abs=1e-12), size


def test_parseval_and_rings() -> None:
    x = images().double()
    power = amplitude(x).square()
    assert torch.allclose(power.sum((-2, -1)), 256 * x.square().sum((-2, -1)))
    rings = radial_sums(power)
    assert rings.shape == (6, 3, 12) and torch.allclose(rings.sum(-1), power.sum((-2, -1)))
    assert torch.allclose(radial_shares(power).sum(-1), torch.ones(6, 3, dtype=torch.float64))
    assert radial_shares(torch.zeros(4, 4)).sum() == 0 == window_share(torch.zeros(4, 4), 2)
    assert radii(4, 4)[0, 0].item() == pytest.approx(math.sqrt(8)) and radii(4, 4)[2, 2] == 0


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 15, 16])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16)])
def test_filters_are_the_real_part_of_a_hard_window(size: int, height: int, width: int) -> None:
    x = images()[..., :height, :width] if height == 16 else torch.rand(2, 1, 17, 16, generator=torch.Generator().manual_seed(1))
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    mask = torch.zeros(height, width)
    top, left = height // 2 - size // 2, width // 2 - size // 2
    mask[top : top + size, left : left + size] = 1
    expected = torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)))
    assert torch.allclose(low_pass(x, size).double(), expected.real, atol=1e-6)
    assert torch.allclose(low_pass(x, size) + high_pass(x, size, keep_mean=False), x, atol=1e-6)
    assert torch.allclose(high_pass(x, size).mean((-2, -1)), x.mean((-2, -1)), atol=1e-6)
    weights = window(height, width, size)
    assert torch.equal(weights, mirrored(weights)) and weights.sum().item() == pytest.approx(size * size)
    if size % 2:  # a symmetric window leaves nothing imaginary
        assert expected.imag.abs().max() < 1e-5


def test_a_window_larger_than_the_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match="size=17 does not fit into a spectrum of 16 x 16: choose 0 to 16"):
        low_pass(images(), 17)


def test_roughness_of_kernels_by_hand() -> None:
    kernel = torch.tensor([[1.0, -1.0], [2.0, 0.0]]).view(1, 1, 2, 2)
    assert kernel_roughness(kernel).item() == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert kernel_roughness(torch.ones(4, 3, 3, 3)) == 0


@pytest.mark.parametrize(("side", "size", "count"), [(32, 31, 481), (32, 32, 514), (8, 8, 34), (9, 9, 41), (32, 1, 1)])
def test_basis_has_unit_norm_and_two_bins(side: int, size: int, count: int) -> None:
    bins, which = directions(side, side, size, size)
    assert len(bins) == count and which.shape == (size, size)
    assert which.unique().tolist() == list(range(count))
    waves = fourier_basis(bins, side, side)
    assert torch.allclose(waves.square().sum((1, 2)), torch.ones(count), atol=1e-5)
    spectrum = torch.fft.fft2(waves.double()).abs() > 1e-4
    u, v = bins.unbind(1)
    own = torch.zeros_like(spectrum)
    own[torch.arange(count), u, v] = own[torch.arange(count), -u % side, -v % side] = True
    assert torch.equal(spectrum, own)
    # The map's centre is (0, 0), and its places stand where a centred spectrum has them.
    half = size // 2
    assert bins[which[half, half]].tolist() == [0, 0]
    if size > 2:
        assert bins[which[half + 1, half]].tolist() in ([1, 0], [side - 1, 0])
        assert which[half + 1, half - 1] == which[half - 1, half + 1] != which[half + 1, half + 1]


class LowFrequencies(nn.Module):
    """Sees one wave alone: class 1 where the image correlates with it by more than what rounding does."""

    def __init__(self, u: int, v: int, side: int = 16) -> None:
        super().__init__()
        self.register_buffer("pattern", wave(u, v, side, side).float())

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.pattern.to(x.dtype)).sum((1, 2, 3)) - 0.1
        return torch.stack([-score, score], 1)


def waves_of_two_classes(n: int = 8) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 2
    x = 0.5 + 0.2 * (2 * y - 1).view(-1, 1, 1, 1) * wave(2, 1).float() + 0.02 * images(n, 1)
    return x.clamp(0, 1), y


def test_filter_finds_the_frequency_that_a_network_sees() -> None:
    x, y = waves_of_two_classes()
    analysis = FrequencyFilter(sizes=[3, 16, 5])
    record = analysis(LowFrequencies(2, 1), batches(x, y, [5, 3]))
    figures = record.figures
    assert figures["whole"] == figures["low_16"] == figures["low_5"] == 1  # |2| fits into -2 ... 2
    assert figures["high_3"] == 1 and figures["low_3"] == figures["high_16"] == figures["high_5"] == 0.5  # nothing is left
    assert record.sheets[0].columns == ["filter", "input", "unfiltered", "r = 16", "r = 5", "r = 3"]
    assert record.sheets[0].rows[0][:4] == ["low pass", "clean", 1.0, 1.0]
    assert record.about["forwards_per_sample"] == 1 + 2 * 3


def test_filter_of_attacked_images_filters_what_the_attack_found() -> None:
    torch.manual_seed(0)
    net, x, y = SmallCNN(width=4).eval(), images(8, 1, 8), torch.arange(8) % 10
    attack = PGD(0.3, steps=2, random_start=True)
    record = FrequencyFilter(attack, [8, 2])(net, batches(x, y, [8]))
    x_adv = attack.run(net, x, y, index=torch.arange(8)).x_adv
    with torch.no_grad():
        by_hand = [(net(image).argmax(1) == y).double().mean().item() for image in (x_adv, low_pass(x_adv, 2).clamp(0, 1))]
    assert [record.figures["whole_adv"], record.figures["low_2_adv"]] == by_hand
    assert record.figures["low_8_adv"] == record.figures["whole_adv"]


def test_heat_map_lights_up_where_the_network_looks() -> None:
    # A wave of the sign against that of the class outweighs it; all other waves are orthogonal to what the network sees.
    x, y = waves_of_two_classes()
    record = FourierHeatMap(size=7, norm=4.0)(LowFrequencies(2, 1), batches(x, y, [8]))
    error = torch.tensor(record.maps[0].values)
    (hot,) = {(i, j) for i, j in (error == error.max()).nonzero().tolist()} - {(3 - 2, 3 - 1)}
    assert hot == (3 + 2, 3 + 1) and error[1, 2] == error[5, 4] > 0
    assert error.flip(0, 1).equal(error)
    assert record.maps[0].x == record.maps[0].y == [-3, -2, -1, 0, 1, 2, 3]
    assert record.figures["clean"] == 0 and record.figures["mean"] == pytest.approx(error.mean().item())
    assert record.about["waves"] == 25


def analyses() -> list[Any]:
    attack = PGD(0.1, steps=2, random_start=True)
    return [
        FourierHeatMap(size=None, norm=1.0, batch_size=7),
        FrequencyFilter(attack),
        PerturbationSpectrum(attack, layers=["layers.0"]),
    ]


@pytest.mark.parametrize("which", range(3))
def test_figures_do_not_depend_on_the_batch(which: int) -> None:
    torch.manual_seed(0)
    net, x, y = SmallCNN(width=4, in_channels=3).eval(), images(9, 3, 8), torch.arange(9) % 10
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = analyses()[which](net, batches(x, y, [9]))
    shuffled = [tuple(part.flip(0) for part in batch) for batch in reversed(batches(x, y, [2, 4, 3]))]
    found = analyses()[which](net, shuffled)
    assert found.figures == pytest.approx(expected.figures, rel=1e-4)
    assert torch.initial_seed() == 5 and torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


class AddsOneWave(PGD):
    """An "attack" whose perturbation is known."""

    def perturb(self, problem: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * wave(3, 1).to(x.dtype)


def test_spectrum_of_a_known_perturbation() -> None:
    x, y = 0.5 * images(4, 2, 16) + 0.2, torch.zeros(4, dtype=torch.int64)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(768, 2))
    record = PerturbationSpectrum(AddsOneWave(0.2), window=5, layers=["0"])(net, batches(x, y, [3, 1]))
    values = torch.tensor(record.maps[0].values)
    assert values[8 + 3, 8 + 1].item() == pytest.approx(0.1 * 128, rel=1e-5) and (values > 1e-3).sum() == 2
    figures = record.figures
    assert figures["low"] == pytest.approx(0, abs=1e-9) and figures["centroid"] == pytest.approx(math.hypot(3, 1), rel=1e-5)
    assert figures["change_0_low"] > 0.9  # of 8 x 8, and the edges' rest
    assert figures["kernel_roughness"] == pytest.approx(kernel_roughness(net[0].weight).item())
    assert record.about["attack_backwards_per_sample"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrequencyFilter(sizes=[]), "must name at least one window"),
        (lambda: FrequencyFilter(sizes=[4, 4]), "each once"),
        (lambda: FrequencyFilter(sizes=[0]), "sizes=0 must be a whole number of at least 1"),
        (lambda: FrequencyFilter(UAP(0.1)), "UAP must see training data first, which FrequencyFilter does not show it"),
        (lambda: FourierHeatMap(norm=0), "norm=0 must be a finite number above 0"),
        (lambda: FourierHeatMap(size=0), "size=0 must be a whole number"),
        (lambda: PerturbationSpectrum(PGD(), window=0), "window=0 must be a whole number"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("analysis", "message"),
    [
        (FrequencyFilter(sizes=[9]), r"sizes=\[9\] holds a window that images of 8 x 8 do not: choose at most 8"),
        (FourierHeatMap(), "size=31 is more than images of 8 x 8 have: choose at most 8, or null"),
        (PerturbationSpectrum(PGD(), window=9), "window=9 is more than images of 8 x 8 have"),
        (
            PerturbationSpectrum(PGD(), layers=["nowhere"]),
            "layers names 'nowhere', which the network has not: .* layers, linear",
        ),
        (PerturbationSpectrum(PGD(), layers=["linear"]), r"layers names 'linear', whose output is \(2, 10\): name modules"),
    ],
)
def test_images_and_layers_that_do_not_fit(analysis: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analysis(SmallCNN(width=4), batches(images(2, 1, 8), torch.tensor([0, 1]), [2]))


@pytest.mark.slow
def test_command_line_with_all_of_them(robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text(
        """
data:
  init_args: {eval_batch_size: 120}
attacks:
  fgsm: {class_path: FGSM, init_args: {eps: 0.2}}
trainer:
  callbacks+:
    - class_path: FrequencyFilter
      init_args: {attack: {class_path: PGD, init_args: {eps: 0.2, steps: 2}}, sizes: [8, 4]}
    - class_path: PerturbationSpectrum
      init_args: {attack: {class_path: PGD, init_args: {eps: 0.2, steps: 2}}, layers: [layers.3], name: spectrum}
    - class_path: FourierHeatMap
      init_args: {size: null, norm: 1.0, samples: 200}
    - class_path: CriticalBandMasking
      init_args: {criterion: 0.6}
"""
    )
    shipped = CONFIGS / "analysis" / "local_complexity.yaml"
    quick = ["--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    robust_pl("fit", "-c", CONFIGS / "digits" / "standard.yaml", "-c", shipped, *quick)
    run = tmp_path / "runs" / "standard"
    complexity = Record.read(run / "analysis" / "fit" / "localcomplexity.json")
    assert complexity.lines[0].x[:3] == [1, 2, 3] and 0 < complexity.figures["test_last"] < 0.5
    best = run / "checkpoints" / "best.ckpt"
    robust_pl("test", "-c", run / "config.yaml", "-c", "more.yaml", "--ckpt_path", best, *quick[2:])
    (folder,) = (run / "analysis").glob("test*")
    names = {"frequencyfilter", "spectrum", "fourierheatmap", "criticalbandmasking"}
    assert {path.stem for path in folder.glob("*.json")} == names == {path.stem for path in folder.glob("*.png")}
    figures = {name: Record.read(folder / f"{name}.json").figures for name in names}
    accuracy = json.loads(next(run.glob("test*/figures.json")).read_text())["acc_clean"]
    filters = figures["frequencyfilter"]
    assert filters["whole"] == filters["low_8"] == figures["criticalbandmasking"]["original"] == pytest.approx(accuracy)
    assert filters["low_4"] < accuracy and figures["fourierheatmap"]["mean"] > figures["fourierheatmap"]["clean"]
    assert figures["spectrum"]["adv"] == filters["whole_adv"] and 0 < figures["spectrum"]["features_layers.3_low"] < 1
    with pytest.raises(SystemExit) as stop:
        robust_pl("test", "-c", run / "config.yaml", "-c", CONFIGS / "analysis" / "frequencies.yaml", "--ckpt_path", best)
    assert stop.value.code == 2
