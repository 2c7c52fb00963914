"""Stylised images: moments by hand, layers by the names of public files, who is whose style, and labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from robust_pl.data import PixelAdaIN, Stylize
from robust_pl.data.augmentations import partners
from robust_pl.data.hashing import hash_keys, integers, uniform
from robust_pl.functional.moments import channel_moments, match_moments
from robust_pl.nets import StyleTransfer
from robust_pl.nets.style_transfer import adain_decoder, vgg_encoder

Files = tuple[str, str]


def batch(count: int = 6, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 5, hash_keys(7, torch.arange(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Random weights in the layout of the public files; that of VGG-19 goes on behind relu4_1."""
    folder = tmp_path_factory.mktemp("adain")
    torch.manual_seed(3)
    encoder, decoder = (net.state_dict() for net in (vgg_encoder(), adain_decoder()))
    torch.save({**encoder, "32.weight": torch.zeros(512, 512, 3, 3), "32.bias": torch.zeros(512)}, folder / "vgg.pth")
    torch.save(decoder, folder / "decoder.pth")
    return str(folder / "vgg.pth"), str(folder / "decoder.pth")


def test_moments_become_those_of_the_style() -> None:
    content, style = torch.randn(3, 4, 9, 7), 3 + 2 * torch.randn(3, 4, 5, 5)
    mean, std = channel_moments(style)
    torch.testing.assert_close(mean.flatten(), style.flatten(2).mean(2).flatten())
    torch.testing.assert_close(std.flatten(), (style.flatten(2).var(2) + 1e-5).sqrt().flatten())
    out_mean, out_std = channel_moments(match_moments(content, mean, std))
    torch.testing.assert_close(out_mean, mean)
    torch.testing.assert_close(out_std, std, rtol=1e-4, atol=0)
    torch.testing.assert_close(match_moments(content, mean, std, 0.0), content)
    half = match_moments(content, mean, std, 0.5)
    torch.testing.assert_close(half, (content + match_moments(content, mean, std)) / 2)


def test_layers_are_those_of_public_files() -> None:
    """Positions of convolutions, their shapes, and of what has no weights, as in the ports of Huang and Belongie's networks."""
    encoder, decoder = vgg_encoder(), adain_decoder()
    planes = [3, 3, 64, 64, 128, 128, *[256] * 4, 512]
    places = [0, 2, 5, 9, 12, 16, 19, 22, 25, 29]
    for place, (before, after) in zip(places, pairwise(planes), strict=True):
        assert tuple(encoder[place].weight.shape[:2]) == (after, before)
    assert [i for i, layer in enumerate(encoder) if isinstance(layer, torch.nn.MaxPool2d)] == [7, 14, 27]
    planes = [512, 256, 256, 256, 256, 128, 128, 64, 64, 3]
    places = [1, 5, 8, 11, 14, 18, 21, 25, 28]
    for place, (before, after) in zip(places, pairwise(planes), strict=True):
        assert tuple(decoder[place].weight.shape[:2]) == (after, before)
    assert (len(encoder), len(decoder)) == (31, 29)
    assert [i for i, layer in enumerate(decoder) if isinstance(layer, torch.nn.Upsample)] == [3, 16, 23]


@pytest.mark.parametrize("size", [16, 13])
def test_style_transfer_by_hand(files: Files, size: int) -> None:
    net = StyleTransfer(*files)
    x, style = batch(2, size)[0], batch(2, 24)[0]
    mean, std = net.moments(style)
    assert mean.shape == std.shape == (2, 512, 1, 1)
    features = net.encoder(x)
    assert features.shape == (2, 512, -(-size // 8), -(-size // 8))
    expected = net.decoder(0.3 * match_moments(features, mean, std) + 0.7 * features)[:, :, :size, :size].clamp(0, 1)
    torch.testing.assert_close(net(x, mean, std, 0.3), expected)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_style_is_another_image_of_the_batch(files: Files) -> None:
    x, y, keys = batch()
    labels = F.one_hot(y, 5).float()
    augment = Stylize(*files, alpha=0.5, probability=0.5, style_label=0.2)
    assert augment.mixes_labels and not Stylize(*files).mixes_labels
    out, mixed = augment(x, labels, keys)
    partner, chosen = partners(keys, 1), uniform(keys, 0) < 0.5
    assert 0 < chosen.sum() < 6 and sorted(partner.tolist()) == list(range(6)) and (partner != torch.arange(6)).all()
    mean, std = augment.transfer.moments(x[partner])
    styled = augment.transfer(x, mean, std, 0.5)
    torch.testing.assert_close(out[chosen], styled[chosen])
    assert torch.equal(out[~chosen], x[~chosen]) and torch.equal(mixed[~chosen], labels[~chosen])
    torch.testing.assert_close(mixed[chosen], (0.8 * labels + 0.2 * labels[partner])[chosen])


def test_the_style_is_a_painting(files: Files, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        image = (torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(i)) * 255).byte()
        Image.fromarray(image.numpy()).save(tmp_path / f"{i % 2}" / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    augment = Stylize(*files, styles=str(tmp_path), max_styles=4, style_size=16, probability=1.0)
    names = [file.name for file in augment.files]
    assert names == ["0.png", "2.png", "4.png", "1.png"]
    x, y, keys = batch()
    out, same = augment(x, y, keys)
    assert same is y
    for i in range(6):
        file = augment.files[int(integers(keys[i], 2, 4))]
        middle = Image.open(file).crop((5, 0, 25, 20)).resize((16, 16), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1) / 255
        mean, std = augment.transfer.moments(pixels.unsqueeze(0))
        torch.testing.assert_close(out[i : i + 1], augment.transfer(x[i : i + 1], mean, std), rtol=1e-4, atol=1e-4)
    # Each sample's style is its own, whatever batch it is in.
    torch.testing.assert_close(augment(x[2:4], y[2:4], keys[2:4])[0], out[2:4], rtol=1e-4, atol=1e-5)


def test_pixel_adain_by_hand() -> None:
    x, y, keys = batch(40)
    labels = F.one_hot(y, 5).float()
    out, mixed = PixelAdaIN(alpha=1.0, probability=0.5, style_label=0.2)(x, labels, keys)
    partner, chosen = partners(keys, 1), uniform(keys, 0) < 0.5
    for i in range(40):
        own, other = x[i].flatten(1), x[partner[i]].flatten(1)
        normed = (own - own.mean(1, keepdim=True)) / (own.var(1, keepdim=True) + 1e-5).sqrt()
        styled = normed * (other.var(1, keepdim=True) + 1e-5).sqrt() + other.mean(1, keepdim=True)
        torch.testing.assert_close(out[i], styled.clamp(0, 1).view_as(x[i]) if chosen[i] else x[i])
        torch.testing.assert_close(mixed[i], 0.8 * labels[i] + 0.2 * labels[partner[i]] if chosen[i] else labels[i])
    grey = PixelAdaIN(probability=1.0)(x[:, :1], y, keys)[0]
    assert grey.shape == (40, 1, 16, 16)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda files: PixelAdaIN(alpha=2), ValueError, "alpha=2 is a share"),
        (lambda files: PixelAdaIN(probability=-1), ValueError, "probability=-1 is a share"),
        (lambda files: Stylize(*files, style_label=1.5), ValueError, "style_label=1.5 is a share"),
        (lambda files: Stylize(*files, styles="x", style_label=0.2), ValueError, "paintings have none"),
        (lambda files: Stylize(*files, styles="nowhere"), FileNotFoundError, "styles=nowhere does not exist or holds no"),
        (lambda files: Stylize(*files, max_styles=0), ValueError, "max_styles=0 must be at least 1"),
        (lambda files: Stylize("none.pth", files[1]), FileNotFoundError, "no file of weights at none.pth"),
        (lambda files: Stylize(files[1], files[1]), ValueError, "Build the network that it was saved from"),
        (lambda files: Stylize(*files)(torch.rand(2, 1, 8, 8), torch.arange(2), torch.arange(2)), ValueError, "1 channel"),
        (lambda files: Stylize(*files)(*batch(2, 8)), ValueError, r"images of \(8, 8\) pixels have no statistics"),
    ],
)
def test_bad_arguments(build: Callable[[Files], object], error: type[Exception], message: str, files: Files) -> None:
    with pytest.raises(error, match=message):
        build(files)
