"""Random networks as augmentations: blocks by hand, what belongs to a sample, and what kernels become."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_pl.data import DistortedNet, Noise2Net
from robust_pl.data.distorted_net import _OPERATIONS
from robust_pl.data.hashing import hash_keys, uniform
from robust_pl.data.noise2net import _weights
from robust_pl.nets import SmallCNN


def batch(count: int = 6, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(count, channels, 12, 10, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count), hash_keys(7, torch.arange(count))


# Noise2Net -----------------------------------------------------------------------------------------------------------


def test_a_block_by_hand() -> None:
    x, _, keys = batch()
    net = Noise2Net(hidden=4)
    out = net.block(x, keys)
    sizes = set()
    for i in range(len(x)):
        key, image = keys[i : i + 1], x[i : i + 1]
        first, last = _weights(key, 0, (16, 3, 1, 1), x)[0], _weights(key, 1, (3, 16, 1, 1), x)[0]
        groups = F.instance_norm(F.conv2d(image, first)).relu().chunk(4, 1)
        done = []
        for place in range(3):
            weight, dilation = _weights(key, 2 + 2 * place, (4, 4, 3, 3), x)[0], place + 1
            seen = groups[place] if place == 0 else groups[place] + done[-1]
            small = bool(uniform(key, 3 + 2 * place) < 0.5)
            sizes.add(small)
            if small:
                seen = F.conv2d(seen, weight[:, :, 1:2, 1:2])
            else:
                seen = F.conv2d(seen, weight, padding=dilation, dilation=dilation)
            done.append(F.instance_norm(seen).relu())
        expected = F.instance_norm(F.conv2d(torch.cat([*done, groups[3]], 1), last))
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    assert sizes == {True, False}
    flat = out.flatten(2)
    torch.testing.assert_close(flat.mean(2), torch.zeros(6, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(2, correction=0), torch.ones(6, 3), atol=1e-3, rtol=0)


def test_four_blocks_each_on_what_the_last_gave() -> None:
    x, y, keys = batch()
    net = Noise2Net(max_eps=0.4, probability=1.0, hidden=4, std=0.2)
    out, same = net(x, y, keys)
    eps = (0.4 * (0.5 + uniform(keys, 1) / 2) * 0.2).float().view(-1, 1, 1, 1)
    assert eps.min() >= 0.04 and eps.max() <= 0.08
    expected = x
    for block in range(4):
        expected = expected + eps * net.block(expected, hash_keys(keys, 2, block))
    torch.testing.assert_close(out, expected.clamp(0, 1))
    assert same is y and out.min() >= 0 and out.max() <= 1


def test_networks_belong_to_samples() -> None:
    x, y, keys = batch(40)
    net = Noise2Net(hidden=4)
    out, _ = net(x, y, keys)
    changed = (out != x).flatten(1).any(1)
    assert torch.equal(changed, uniform(keys, 0) < 0.5) and 8 < changed.sum() < 32
    torch.testing.assert_close(net(x[7:12], y[7:12], keys[7:12])[0], out[7:12], rtol=1e-4, atol=1e-4)
    assert torch.equal(net(x, y, keys)[0], out)
    always = Noise2Net(hidden=4, probability=1.0)
    one, other = (always(x[:1], y[:1], hash_keys(seed, torch.arange(1)))[0] for seed in (1, 2))
    assert not torch.equal(one, other)
    assert torch.equal(Noise2Net(max_eps=0.0, probability=1.0)(x, y, keys)[0], x)
    assert Noise2Net()(x[:, :1], y, keys)[0].shape == (40, 1, 12, 10)


# Distorted networks --------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """An image-to-image network that doubles sides, and begins as (nearly) a copy."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")


def back(x: Tensor) -> Tensor:
    return F.interpolate(x, (12, 10), mode="bilinear", antialias=True)


def test_without_distortion_images_go_through_the_network() -> None:
    x, y, keys = batch()
    out, same = DistortedNet(Twice(), share=0.0, probability=1.0)(x, y, keys)
    torch.testing.assert_close(out, back(Twice()(x)))
    torch.testing.assert_close(DistortedNet(Twice().conv, share=0.0, probability=1.0)(x, y, keys)[0], x)
    assert same is y
    out, _ = DistortedNet(Twice(), share=0.0, probability=0.0)(x, y, keys)
    assert torch.equal(out, x)


def test_copies_share_the_batch_and_are_drawn_from_its_first_key() -> None:
    x, y, keys = batch(40)
    augment = DistortedNet(Twice(), copies=3, share=1.0, probability=1.0)
    out, _ = augment(x, y, keys)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)
    for copy, (part, expected) in enumerate(zip(x.chunk(3), out.chunk(3), strict=True)):
        kernels = augment.distorted(hash_keys(keys[0], 1, copy))
        seen = F.interpolate(F.conv2d(part, kernels["conv.weight"], padding=1), scale_factor=2.0, mode="nearest")
        torch.testing.assert_close(back(seen).clamp(0, 1), expected)
    assert torch.equal(augment(x, y, keys)[0], out)
    weight = augment.net.net.conv.weight
    assert torch.equal(weight, Twice().conv.weight) and not weight.requires_grad


def test_operations_on_kernels_by_hand() -> None:
    weight, noise = torch.arange(1.0, 10).view(1, 1, 3, 3), torch.linspace(0, 0.9, 9).view(1, 1, 3, 3)
    low = noise.flatten() < 0.5
    expected = [
        [3, 2, 1, 6, 5, 4, 9, 8, 7],
        [7, 8, 9, 4, 5, 6, 1, 2, 3],
        [3, 6, 9, 2, 5, 8, 1, 4, 7],
        [-1, -2, -3, -4, -5, -6, -7, -8, -9],
        [0] * 9,
        [0] * 8 + [9],
        [(-v if one else v) for v, one in zip(range(1, 10), low, strict=True)],
        [(v if one else 0) for v, one in zip(range(1, 10), low, strict=True)],
        (weight * (0.5 + noise)).flatten().tolist(),
        [12 / 9, 21 / 9, 16 / 9, 27 / 9, 5, 33 / 9, 24 / 9, 39 / 9, 28 / 9],
    ]
    for operation, values in zip(_OPERATIONS, expected, strict=True):
        torch.testing.assert_close(operation(weight, noise).flatten(), torch.tensor(values, dtype=torch.float32))


def test_a_distortion_changes_a_share_of_the_kernels() -> None:
    augment = DistortedNet(nn.Conv2d(40, 40, 3), operations=1, share=0.5)
    shares = []
    for seed in range(30):
        kernels = augment.distorted(hash_keys(torch.tensor(seed)))["weight"]
        changed = (kernels != augment.net.net.weight).flatten(2).any(2).float().mean()
        shares.append(float(changed))
    assert max(shares) < 0.55 and 0.15 < sum(shares) / 30 < 0.35


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Noise2Net(max_eps=-1), "max_eps=-1 and std=0.225 must be at least 0"),
        (lambda: Noise2Net(probability=2), "probability=2 must lie in"),
        (lambda: Noise2Net(hidden=0), "hidden=0 must be at least 1"),
        (lambda: DistortedNet(nn.Identity()), "net is a Identity without convolutions"),
        (lambda: DistortedNet(Twice(), copies=0), "copies=0 must be at least 1"),
        (lambda: DistortedNet(Twice(), share=1.2), "share=1.2 must lie in"),
        (lambda: DistortedNet(SmallCNN(in_channels=3))(*batch()), "each image must become one of as many channels"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_of_an_image_to_image_network_that_are_missing() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of weights at edsr\.pt"):
        DistortedNet(Twice(), "edsr.pt")
