"""FGSM-LAW: its loss by its parts, and which steps its average takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import EMA, FGSM, SWA
from robust_pl.methods import FGSMLAW, Example
from robust_pl.methods.fast.fgsm_law import ReferredExample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd
from .test_single_step_methods import EPS, batch


def law(net: nn.Module | None = None, **more: Any) -> FGSMLAW:
    return FGSMLAW(SmallCNN(width=4) if net is None else net, FGSM(EPS, random_start="bernoulli"), optimizer=sgd, **more)


def test_law_refers_to_clean_samples_or_to_the_start() -> None:
    x = batch()[0]
    assert torch.equal(law().craft(batch()).reference, x)
    start = law(reference="start").craft(batch()).reference
    assert torch.allclose((start - x).abs(), torch.full_like(x, EPS / 2), atol=1e-6)


def test_laws_loss_by_its_parts() -> None:
    torch.manual_seed(0)
    method = law(lmbda=2.0, label_factor=0.7).double()
    x, y, index = batch()
    x, x_adv = x.double(), (x + EPS).double()
    found = method.loss(ReferredExample(x, y, index, x_adv, x))
    net = method.net
    h, h_ref = net.forward_features(x_adv), net.forward_features(x)
    z, z_ref = net.head(h), net.head(h_ref)
    labels = torch.full((8, 10), 0.3 / 9, dtype=torch.float64).scatter(1, y.unsqueeze(1), 0.7)
    cross_entropy = -(labels * z.log_softmax(1)).sum(1).mean()
    change = (z.softmax(1) - z_ref.softmax(1)).square().mean() + (h.softmax(1) - h_ref.softmax(1)).square().mean()
    expected = cross_entropy + 2.0 * change / ((x_adv - x).square().mean() + 0.125)
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)


class Fixed(SmallCNN):
    """Predicts class 0 for dark and class 1 for bright images."""

    def features(self, z: Tensor) -> Tensor:
        return super().features(z) * 0 + F.pad(z.mean((1, 2, 3)).unsqueeze(1) - 0.5, (0, 7))


@pytest.mark.parametrize(("right_adv", "right_ref", "accepted"), [(3, 8, 1.0), (7, 8, 0.0), (8, 8, 0.0), (0, 0, 0.0)])
def test_law_averages_safe_steps_alone(right_adv: int, right_ref: int, accepted: float) -> None:
    """Safe is what attacked samples are right in less than 0.82 times as often as clean ones."""
    method = law(Fixed(width=4))
    nn.init.zeros_(method.net.linear.bias)
    with torch.no_grad():
        method.net.linear.weight.zero_()
        method.net.linear.weight[:2, 0] = torch.tensor([-1.0, 1.0])
    method.trainer = Trainer(**QUIET)
    bright = torch.tensor([[0.2], [0.8]])
    shown = lambda right: bright[(torch.arange(8) < right).long()].view(8, 1, 1, 1).expand(8, 1, 8, 8)  # noqa: E731
    method.eval()
    y = torch.ones(8, dtype=torch.int64)
    example = ReferredExample(shown(right_ref), y, torch.arange(8), shown(right_adv), shown(right_ref))
    method.loss(example)
    with torch.no_grad():  # as a weight perturbation would ask again, at weights at which nothing is right
        method.net.linear.weight.neg_()
    method.loss(example)
    halves = [ReferredExample(**{k: v[part] for k, v in vars(example).items()}) for part in (slice(0, 4), slice(4, 8))]
    method.after_step(Example.join(halves))
    weight = method.averaging_weight()
    assert weight.item() == accepted and weight.shape == ()
    assert torch.equal(method.averaging_weight(), weight)  # several averages may ask


def test_law_leaves_its_average_where_it_was_after_an_unsafe_step() -> None:
    for accept_below, moved in ((1e-9, False), (1e9, True)):
        torch.manual_seed(0)
        method = law(Fixed(width=4), accept_below=accept_below)
        with torch.no_grad():
            method.net.linear.weight.zero_()
            method.net.linear.bias.copy_(10 * F.one_hot(torch.tensor(3), 10))  # always right in the data below
        x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        data = DataLoader(TensorDataset(x, torch.full((24,), 3)), 8)
        trainer = Trainer(max_epochs=1, accumulate_grad_batches=3, limit_val_batches=0, **QUIET)
        before = method.net.linear.weight.detach().clone()
        trainer.fit(method, data)
        average = next(c for c in trainer.callbacks if isinstance(c, EMA))
        assert average.progress()["updates"] == int(moved)
        assert torch.equal(average.weights["net.linear.weight"], before) != moved
        assert not torch.equal(method.net.linear.weight, before)


def test_law_brings_its_average_unless_there_is_one() -> None:
    for given, expected in (([], ["EMA"]), ([SWA()], ["SWA", "EMA"]), ([EMA(0.5)], ["EMA"])):
        trainer = Trainer(max_epochs=1, callbacks=list(given), limit_val_batches=0, **QUIET)
        trainer.fit(law(), loader())
        assert [type(c).__name__ for c in trainer.callbacks if isinstance(c, EMA | SWA)] == expected
    assert next(c for c in trainer.callbacks if isinstance(c, EMA)).decay == 0.5


def test_law_needs_a_last_linear_layer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    method = FGSMLAW(net, FGSM(EPS, random_start="bernoulli"))
    with pytest.raises(ValueError, match="no linear layer of the network returns its logits"):
        method.loss(method.craft(batch()))
    method = law(torch.compile(SmallCNN(width=4), backend="eager"))
    with pytest.raises(ValueError, match="does not show the features"):
        method.loss(method.craft(batch()))


def test_law_can_be_told_its_layer() -> None:
    class Scaled(SmallCNN):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    method = law(Scaled(width=4), layer="linear").eval()
    loss = method.loss(method.craft(batch()))
    assert loss.isfinite() and loss.dtype == torch.float32
