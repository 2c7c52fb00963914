"""AugMax: the search of the worst mixture, which BatchNorms it goes through, its loss, and its network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.data import DigitsDataModule
from robust_pl.data.augmix import AugMixChains
from robust_pl.methods import AugMax
from robust_pl.methods.natural.augmax import AugMaxExample, mixture
from robust_pl.nets import DualBatchNorm, DualNet, DuBINNet, ResNet18, SmallCNN
from robust_pl.nets.dubin import InstanceBatchNorm

from .test_methods import QUIET

Batch = tuple[Tensor, Tensor, Tensor]


def method(**more: object) -> AugMax:
    torch.manual_seed(0)
    return AugMax(DualNet(SmallCNN(width=4)), **more)


def batch(count: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    return x, torch.randint(10, (count,), generator=generator), torch.arange(count)


class Linear(nn.Module):
    """Logits that are linear in the pixels, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1))


def test_a_mixture_is_convex_and_keeps_the_image_at_zero() -> None:
    x, chains = torch.rand(4, 3, 8, 8), torch.rand(3, 4, 3, 8, 8)
    q = torch.randn(3, 4)
    assert torch.equal(mixture(x, chains, torch.zeros(4), q), x)
    out, every = mixture(x, chains, torch.rand(4), q), torch.cat([x.unsqueeze(0), chains])
    assert (out <= every.amax(0) + 1e-6).all() and (out >= every.amin(0) - 1e-6).all()
    by_hand = 0.25 * x + 0.75 * (q.softmax(0).view(3, 4, 1, 1, 1) * chains).sum(0)
    torch.testing.assert_close(mixture(x, chains, torch.full((4,), 0.75), q), by_hand)


def test_one_step_follows_the_signs_of_the_slope() -> None:
    torch.manual_seed(0)
    augmax = AugMax(DualNet(Linear()).double(), steps=1, step_size=0.1, tau=None)
    x, y, _ = batch(6)
    x = x.double()
    chains = torch.rand(3, 6, 1, 8, 8, dtype=torch.float64)
    m, q = torch.rand(6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    found_m, found_q = augmax.search(x, y, chains, m, q)
    augmax.eval()

    def loss(m: Tensor, q: Tensor) -> Tensor:
        with torch.no_grad(), augmax.net.through("aux"):
            return F.cross_entropy(augmax(mixture(x, chains, m, q)), y, reduction="none")

    h = 1e-5
    slope = loss(m + h, q) - loss(m - h, q)
    torch.testing.assert_close(found_m, (m + 0.1 * slope.sign()).clamp(0, 1))
    for i in range(3):
        bump = h * F.one_hot(torch.tensor(i), 3).double().unsqueeze(1)
        torch.testing.assert_close(found_q[i], q[i] + 0.1 * (loss(m, q + bump) - loss(m, q - bump)).sign())


def test_the_search_finds_what_is_worse_and_stays_in_its_range() -> None:
    augmax = method(steps=10, tau=None)
    x, y, _ = batch(64)
    chains, (m, q) = torch.rand(3, 64, 1, 8, 8), augmax.start(torch.arange(64))
    assert m.shape == (64,) and q.shape == (3, 64)
    assert len(torch.cat([m.unsqueeze(0), q]).unique()) == 256 and all(t.min() >= 0 and t.max() < 1 for t in (m, q))
    found_m, found_q = augmax.search(x, y, chains, m, q)
    assert found_m.min() >= 0 and found_m.max() <= 1 and not found_m.requires_grad
    augmax.eval()
    with torch.no_grad(), augmax.net.through("aux"):
        before, after = (F.cross_entropy(augmax(mixture(x, chains, *at)), y) for at in ((m, q), (found_m, found_q)))
    assert after > before


@pytest.mark.parametrize("tau", [1, 2])
def test_samples_stop_where_they_are_misclassified(tau: int) -> None:
    augmax = method(steps=4, tau=tau)
    x, _, _ = batch()
    chains, (m, q) = torch.rand(3, 16, 1, 8, 8), augmax.start(torch.arange(16))
    augmax.eval()
    with torch.no_grad(), augmax.net.through("aux"):
        predicted = augmax(mixture(x, chains, m, q)).argmax(1)
    y = torch.where(torch.arange(16) < 8, predicted, (predicted + 1) % 10)
    found_m, found_q = augmax.search(x, y, chains, m, q)
    moved = (found_q - q).abs().amax(0)
    torch.testing.assert_close(moved[8:], torch.full((8,), 0.1 * (tau - 1)))
    if tau == 1:
        assert torch.equal(found_m[8:], m[8:]) and torch.equal(found_q[:, 8:], q[:, 8:])
    assert (moved[:8] >= 0.1 - 1e-6).all(), "those that are right move"


def test_each_kind_of_image_has_its_batch_norms() -> None:
    augmax = method()
    norm = next(m for m in augmax.modules() if isinstance(m, DualBatchNorm))
    convolution = augmax.net.net.layers[0]
    augmax.train()
    example = augmax.craft(batch())
    assert all(part.num_batches_tracked == 0 for part in (norm.clean, norm.adv)), "the search moves no statistics"
    assert augmax.training and all(p.grad is None and p.requires_grad for p in augmax.parameters())
    augmax.loss(example)
    for part, images in ((norm.clean, torch.cat([example.x, example.x_mix])), (norm.adv, example.x_adv)):
        torch.testing.assert_close(part.running_mean, 0.1 * convolution(images).mean((0, 2, 3)))


def test_the_loss_by_hand() -> None:
    augmax = method(weight=3.0)
    x, y, index = batch()
    example = AugMaxExample(x, y, index, torch.rand_like(x), torch.rand_like(x))
    augmax.eval()
    with torch.no_grad():
        p = torch.stack([augmax(example.x).softmax(1), augmax(example.x_mix).softmax(1)])
        with augmax.net.through("aux"):
            p = torch.cat([p, augmax(example.x_adv).softmax(1).unsqueeze(0)])
        middle = p.mean(0)
        divergence = sum((one * (one / middle).log()).sum(1).mean() for one in p) / 3
        expected = -p[0].gather(1, y.unsqueeze(1)).log().mean() + 3 * divergence
        torch.testing.assert_close(augmax.loss(example), expected)


def test_draws_belong_to_seed_and_sample() -> None:
    augmax = method(steps=1)
    x, y, index = batch()
    whole, part = augmax.craft((x, y, index)), augmax.craft((x[5:9], y[5:9], index[5:9]))
    for name in ("x_adv", "x_mix"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[5:9])
        assert not torch.equal(getattr(method(steps=1, seed=1).craft((x, y, index)), name), getattr(whole, name))


def test_half_precision_is_refused_before_training() -> None:
    trainer = Trainer(max_steps=1, precision="16-true", **QUIET)
    with pytest.raises(ValueError, match="precision 16 rounds small gradients of mixing weights to 0"):
        trainer.fit(method(), DigitsDataModule(batch_size=16))


def test_mixed_labels() -> None:
    x, y, index = batch()
    augmax = method()
    assert augmax.loss(augmax.craft((x, F.one_hot(y, 10).float(), index))).isfinite()


# The network ---------------------------------------------------------------------------------------------------------


def test_half_of_the_channels_look_at_one_image() -> None:
    norm = nn.BatchNorm2d(5)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    norm.running_mean.uniform_()
    z = torch.randn(4, 5, 6, 6)
    for train in (True, False):
        halved = InstanceBatchNorm(norm).train(train)
        expected = norm.train(train)(z)
        expected[:, :2] = F.instance_norm(z[:, :2], weight=norm.weight[:2], bias=norm.bias[:2])
        torch.testing.assert_close(halved(z), expected)


def test_dubin_halves_the_first_norms_of_three_stages() -> None:
    net = DuBINNet(ResNet18())
    names = {name for name, m in net.named_modules() if isinstance(m, InstanceBatchNorm)}
    assert names == {f"net.layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in (0, 1)}
    assert isinstance(net.net.layer4[0].bn1, DualBatchNorm) and isinstance(net.net.layer1[0].bn1.batch, DualBatchNorm)
    assert not any(isinstance(m, nn.BatchNorm2d) for name, m in net.named_modules() if not name.endswith((".clean", ".adv")))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: AugMax(SmallCNN()), TypeError, "net is a SmallCNN: AugMax trains a network with two BatchNorms"),
        (lambda: method(steps=0), ValueError, "steps=0 must be at least 1"),
        (lambda: method(tau=0), ValueError, "tau=0 must be at least 1"),
        (lambda: method(weight=-1), ValueError, "weight=-1 must be at least 0"),
        (lambda: method(step_size=-0.1), ValueError, "step_size=-0.1 must be at least 0"),
        (lambda: DuBINNet(SmallCNN()), ValueError, r"fits no BatchNorm2d of SmallCNN \(there: layers.1, layers.4"),
        (lambda: DuBINNet(SmallCNN(), "sideways", ["layers.1"]), ValueError, "route='sideways' is unknown"),
        (lambda: InstanceBatchNorm(nn.BatchNorm2d(1)), ValueError, "it needs two channels"),
        (lambda: method(chains=AugMixChains(width=0)), ValueError, "width=0"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
