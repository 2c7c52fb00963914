"""ZeroGrad and MultiGrad: which entries step, and one training step of each by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_pl.callbacks import FGSM, UnanimousFGSM, ZeroedFGSM
from robust_pl.methods import Example, MultiGrad, ZeroGrad
from robust_pl.nets import SmallCNN

EPS = 0.1
W = torch.tensor([3.0, -1.0, 0.5, -2.0, 0.1, 4.0, -0.2, 0.3, -5.0, 0.7], dtype=torch.float64)


class Straight(nn.Module):
    """Two logits, (0, w x): the input gradient of its cross-entropy with class 0 is w times a number above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(z), z], 1)


class Bowl(nn.Module):
    """Two logits, (0, |x - 0.5|^2 / 2): the sign of its gradient with class 0 is that of x - 0.5. It keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        z = self.scale * (x.flatten(1) - 0.5).square().sum(1) / 2
        return torch.stack([torch.zeros_like(z), z], 1)


def pixels(n: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.4 + 0.2 * torch.rand(n, 1, 2, 5, generator=generator, dtype=torch.float64)


def test_small_gradients_keep_their_random_start() -> None:
    """0.35 of ten entries: the quantile lies between the fourth and the fifth smallest, so the six largest step."""
    x, y = pixels(), torch.zeros(4, dtype=torch.int64)
    attacked = ZeroedFGSM(EPS, q=0.35).run(Straight(), x, y)
    large = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool).view(1, 1, 2, 5)  # 0.1, 0.2, 0.3 and 0.5 are not
    expected = torch.where(large, x + EPS * W.sign().view(1, 1, 2, 5), attacked.start)
    assert torch.allclose(attacked.x_adv, expected, atol=1e-12)
    noise = attacked.start - x
    assert noise.abs().max() <= EPS + 1e-12 and noise.abs().max() > 0.8 * EPS and (noise.abs() < EPS).all()


def test_a_shorter_step_starts_at_the_noise() -> None:
    x, y = pixels(), torch.zeros(4, dtype=torch.int64)
    attacked = ZeroedFGSM(EPS, q=0.0, step_size=0.02).run(Straight(), x, y)
    expected = (attacked.start + 0.02 * W.sign().view(1, 1, 2, 5)).clamp(x - EPS, x + EPS)
    assert torch.allclose(attacked.x_adv, expected, atol=1e-12)


@pytest.mark.parametrize("q", [0.0, 0.2, 0.35, 0.45, 0.5, 0.625, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(3, 1, 3, 3), (2, 3, 4, 4), (5, 1, 1, 1), (4, 5, 13, 1)])
def test_kept_are_those_that_an_interpolated_quantile_keeps(q: float, shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient[0] = gradient[0].round()  # with ties
    limit = torch.quantile(gradient.abs().flatten(1), q, dim=1).view(-1, 1, 1, 1)
    assert torch.equal(ZeroedFGSM(EPS, q)._large(gradient), gradient.abs() >= limit)


def test_the_quantile_is_that_of_each_sample() -> None:
    gradient = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 1e-6, 1e6]).view(
        -1, 1, 1, 1
    )
    assert (ZeroedFGSM(EPS, 0.5)._large(gradient).flatten(1).sum(1) == 8).all()


@pytest.mark.parametrize("agree", [None, 2])
def test_multi_grad_steps_where_signs_agree(agree: int | None) -> None:
    """Entries near 0.5 have gradients of either sign within the ball, the others of one."""
    x, y = pixels(seed=1), torch.zeros(4, dtype=torch.int64)
    x[:, :, 0] = 0.5
    x[:, :, 1, :2] = 0.7
    net = Bowl()
    attacked = UnanimousFGSM(EPS, 3, agree).run(net, x, y)
    (points,) = net.seen  # one pass for all starts
    assert points.shape == (12, 1, 2, 5)
    first, second, third = points[:4], points[4:8], points[8:]
    votes = torch.sign(first - 0.5) + torch.sign(second - 0.5) + torch.sign(third - 0.5)
    same = votes.abs() == 3 if agree is None else votes.abs() >= 1
    assert torch.allclose(attacked.x_adv, torch.where(same, x + EPS * votes.sign(), x), atol=1e-12)
    assert same[:, :, 1, :2].all() and same[:, :, 0].all() == (agree == 2)
    for point in (first, second, third):
        assert (point - x).abs().max() <= EPS + 1e-12 and not torch.equal(point, second if point is first else first)
    assert (attacked.forwards, attacked.backwards) == (12, 12)


def test_multi_grad_with_one_start_is_a_step_from_x() -> None:
    x, y = pixels(), torch.zeros(4, dtype=torch.int64)
    assert torch.allclose(UnanimousFGSM(EPS, 1)(Straight(), x, y), FGSM(EPS)(Straight(), x, y), atol=1e-12)


def test_attacks_stay_in_the_box() -> None:
    x, y = pixels().round(), torch.zeros(4, dtype=torch.int64)
    for attack in (ZeroedFGSM(EPS), UnanimousFGSM(EPS)):
        x_adv = attack(Straight(), x, y)
        assert x_adv.min() == 0 and x_adv.max() <= 1


@pytest.mark.parametrize("build", [lambda net: ZeroGrad(net, ZeroedFGSM(EPS)), lambda net: MultiGrad(net, UnanimousFGSM(EPS))])
def test_one_step_by_hand(build: Callable[[nn.Module], ZeroGrad]) -> None:
    """Loss and gradient for (0, w x): log(1 + exp(w x_adv)) with class 0 and smoothed labels, and its derivative by w."""
    method = build(Straight())
    x, share = pixels(), 0.3
    y = torch.tensor([[1 - share, share]], dtype=torch.float64).repeat(4, 1)
    example = method.craft((x, y, torch.arange(4)))
    rows = example.x_adv.flatten(1)
    z = rows @ W
    expected = (torch.log1p(torch.exp(z)) - share * z).mean()
    found = method.loss(example)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    found.backward()
    by_hand = ((torch.sigmoid(z) - share).unsqueeze(1) * rows).mean(0)
    assert torch.allclose(method.net.w.grad, by_hand, atol=1e-12)


@pytest.mark.parametrize("build", [lambda net, attack: ZeroGrad(net, attack), lambda net, attack: MultiGrad(net, attack)])
def test_attacks_see_hard_labels(build: Callable[[nn.Module, ZeroedFGSM], ZeroGrad]) -> None:
    """Where the network is surer than the smoothed label, the gradient of smoothed cross-entropy points the other way."""
    x = torch.full((2, 1, 2, 5), 0.5, dtype=torch.float64)
    x[:, :, 1, 3] = 0.9  # w = -5: class 0 is predicted with 0.997
    smooth = torch.tensor([[0.6, 0.4]], dtype=torch.float64).repeat(2, 1)
    batch = lambda y: (x, y, torch.arange(2))  # noqa: E731
    on_hard = build(Straight(), ZeroedFGSM(EPS)).craft(batch(torch.zeros(2, dtype=torch.int64))).x_adv
    assert torch.equal(build(Straight(), ZeroedFGSM(EPS)).craft(batch(smooth)).x_adv, on_hard)
    named = build(Straight(), ZeroedFGSM(EPS, objective="ce")).craft(batch(smooth)).x_adv
    moved = (on_hard - x).sign() * (named - x).sign()
    assert (moved[:, :, 0, :2] == -1).all()


def test_default_attacks_are_the_papers() -> None:
    zero, multi = ZeroGrad(SmallCNN()).attack, MultiGrad(SmallCNN()).attack
    assert isinstance(zero, ZeroedFGSM) and (zero.eps, zero.q, zero.step_size) == (8 / 255, 0.35, None)
    assert isinstance(multi, UnanimousFGSM) and (multi.eps, multi.starts, multi.agree) == (8 / 255, 3, None)
    assert {zero.bn_mode, multi.bn_mode} == {"train"} and zero.is_random and multi.is_random


def test_a_weight_perturbation_gets_the_same_loss_twice() -> None:
    method = ZeroGrad(SmallCNN(width=4), ZeroedFGSM(EPS)).eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    example = method.craft((x, torch.arange(4), torch.arange(4)))
    assert isinstance(example, Example) and torch.equal(method.loss(example), method.loss(example))
    assert torch.equal(method.loss(example), F.cross_entropy(method(example.x_adv), example.y))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZeroedFGSM(q=1.0), r"q=1.0 is the share .* \[0, 1\)"),
        (lambda: ZeroedFGSM(q=-0.1), "q=-0.1"),
        (lambda: ZeroedFGSM(step_size=0), "step_size=0"),
        (lambda: UnanimousFGSM(starts=0), "starts=0"),
        (lambda: UnanimousFGSM(agree=1), "agree=1 is how many of 3 signs"),
        (lambda: UnanimousFGSM(starts=4, agree=5), "agree=5"),
        (lambda: UnanimousFGSM(starts=4, agree=2), "more than half"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
