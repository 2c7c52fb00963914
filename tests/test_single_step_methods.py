"""Fast adversarial training, N-FGSM, GradAlign, FR and SAR: what is theirs beside the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD, DeepFool, NoisyFGSM
from robust_pl.functional.losses import frequency_regularization
from robust_pl.methods import FGSMAT, FGSMLAW, FR, MART, NFGSM, SAR, Example, FastAT, GradAlign
from robust_pl.nets import SmallCNN

from .test_methods import QUIET

EPS = 0.1


def batch(n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(n, 1, 8, 8, generator=generator)  # far from the box, so that nothing is cut
    return x, torch.randint(10, (n,), generator=generator), torch.arange(n)


def test_default_attacks_are_the_papers() -> None:
    fast, plain, noisy = FastAT(SmallCNN()).attack, FGSMAT(SmallCNN()).attack, NFGSM(SmallCNN()).attack
    assert (fast.eps, fast.step_size, fast.random_start) == (8 / 255, 10 / 255, True)
    assert (plain.eps, plain.step_size, plain.random_start) == (8 / 255, None, False)
    assert isinstance(noisy, NoisyFGSM) and (noisy.eps, noisy.k) == (8 / 255, 2.0)
    assert {a.bn_mode for a in (fast, plain, noisy)} == {"train"}
    assert MART(SmallCNN()).attack.random_start == "normal" and MART(SmallCNN()).inner_objective == "ce"
    assert FGSMLAW(SmallCNN()).attack.random_start == "bernoulli"


def test_noise_and_step_of_n_fgsm_leave_the_ball_and_stay_in_three_of_them() -> None:
    torch.manual_seed(0)
    x, y, _ = batch()
    delta = (NoisyFGSM(0.05, k=2.0, bn_mode="eval")(SmallCNN(width=4), x, y) - x).abs()
    assert 0.1 < delta.max() <= 0.15 + 1e-6
    # Uniform noise in +-0.1, then a step of 0.05 up or down: half of the entries end farther than 0.05 away.
    assert (delta > 0.05).float().mean() == pytest.approx(0.5, abs=0.06)


def test_n_fgsm_stays_in_the_box() -> None:
    torch.manual_seed(0)
    x, y, _ = batch()
    x_adv = NoisyFGSM(0.4)(SmallCNN(width=4), x, y)
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_without_noise_n_fgsm_is_fgsm() -> None:
    torch.manual_seed(0)
    net, (x, y, _) = SmallCNN(width=4), batch()
    assert torch.allclose(NoisyFGSM(0.05, k=0.0, bn_mode="eval")(net, x, y), FGSM(0.05)(net, x, y), atol=1e-7)


def test_what_leaves_the_ball_is_refused_in_an_evaluation() -> None:
    with pytest.raises(ValueError, match="NoisyFGSM leaves the ball"):
        evaluate(SmallCNN(width=4), batch()[:2], {"n_fgsm": NoisyFGSM(EPS)})


def test_bernoulli_starts_at_corners() -> None:
    x, y, _ = batch()
    attacked = FGSM(0.05, 1e-9, random_start="bernoulli").run(SmallCNN(width=4), x, y)
    delta = attacked.start - x
    assert torch.allclose(delta.abs(), torch.full_like(delta, 0.025), atol=1e-6)
    assert 0.4 < (delta > 0).float().mean() < 0.6
    with pytest.raises(ValueError, match="bernoulli"):
        PGD(0.5, norm="l2", random_start="bernoulli")


class Quadratic(nn.Module):
    """Two logits, (0, z) with z = sum a_i x_i^2 / 2: its input gradient is a_i x_i times a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = (self.a * x.flatten(1).square()).sum(1) / 2
        return torch.stack([torch.zeros_like(z), z], 1)


def test_grad_align_by_hand() -> None:
    """1 - cos(a x, a (x + n)) and its derivative by a, which needs the double backward pass."""
    method = GradAlign(Quadratic(), FGSM(EPS), lmbda=1.0, num_classes=2)
    x = torch.tensor([0.5, 0.3], dtype=torch.float64).view(1, 1, 1, 2)
    y, index = torch.tensor([0]), torch.tensor([0])
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    noise = torch.tensor([0.1, -0.05], dtype=torch.float64).view_as(x)
    example = method.craft((x, y, index))
    assert torch.allclose(F.normalize(example.gradient.flatten(), dim=0), F.normalize(a * x.flatten(), dim=0), atol=1e-12)
    example.noise = noise

    def by_hand(weights: Tensor) -> Tensor:
        fixed, moved = a * x.flatten(), weights * (x + noise).flatten()
        return 1 - (fixed @ moved) / (fixed.norm() * moved.norm())

    plain = F.cross_entropy(method(example.x_adv), y)
    whole = method.loss(example)
    assert (whole - plain).item() == pytest.approx(by_hand(a).item(), abs=1e-10)
    (found,) = torch.autograd.grad(whole - plain, method.net.a)
    free = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(free), free)
    assert torch.allclose(found, expected, atol=1e-10) and found.abs().max() > 1e-3


def test_grad_aligns_noise_is_its_own() -> None:
    method = GradAlign(SmallCNN(width=4), FGSM(EPS, seed=3))
    before = torch.get_rng_state()
    first, second = method.craft(batch()).noise, method.craft(batch()).noise
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first, second)
    assert first.abs().max() <= EPS and first.abs().max() > 0.95 * EPS
    again = GradAlign(SmallCNN(width=4), FGSM(EPS, seed=3))
    assert torch.equal(again.craft(batch()).noise, first)


def test_grad_aligns_noise_has_the_radius_of_its_sample() -> None:
    eps = torch.linspace(0.01, 0.1, 8).view(8, 1, 1, 1)
    for example in (
        GradAlign(SmallCNN(width=4), FGSM(EPS)).craft(batch(), eps),
        GradAlign(SmallCNN(width=4), FGSM(eps)).craft(batch()),
    ):
        largest = example.noise.abs().amax((1, 2, 3), keepdim=True)
        assert (largest <= eps).all() and (largest > 0.8 * eps).all()


def test_grad_align_refuses_a_compiled_network() -> None:
    method = GradAlign(SmallCNN(width=4), FGSM(EPS))
    example = method.craft(batch())
    for net in (torch.compile(SmallCNN(width=4), backend="eager"), SmallCNN(width=4)):
        if isinstance(net, SmallCNN):
            net.compile(backend="eager")  # in place
        method.net = net
        with pytest.raises(ValueError, match="cannot be differentiated twice"):
            method.loss(example)


def test_grad_align_needs_a_gradient_at_x() -> None:
    with pytest.raises(ValueError, match="DeepFool takes none"):
        GradAlign(SmallCNN(width=4), DeepFool(EPS, norm="linf")).craft(batch())


def test_fr_begins_at_its_epoch() -> None:
    torch.manual_seed(0)
    example = Example(*batch(), batch()[0] + EPS)
    method = FR(SmallCNN(width=4), lmbda=0.3, start_epoch=1)
    method.trainer = Trainer(**QUIET)
    method.eval()
    assert torch.equal(method.loss(example), F.cross_entropy(method(example.x_adv), example.y))
    method.trainer.fit_loop.epoch_progress.current.completed = 1
    expected = F.cross_entropy(method(example.x_adv), example.y)
    expected = expected + 0.3 * frequency_regularization(method(example.x), method(example.x_adv))
    assert method.loss(example).item() == pytest.approx(expected.item(), abs=1e-6)


def test_frs_weight_depends_on_its_mode() -> None:
    assert FR(SmallCNN()).lmbda == 0.1 and FR(SmallCNN(), mode="class1d").lmbda == 1.2 and FR(SmallCNN(), lmbda=0).lmbda == 0


def test_sar_with_its_choices_of_fr_is_fr() -> None:
    torch.manual_seed(0)
    net, example = SmallCNN(width=4).eval(), Example(*batch(), batch()[0] + EPS)
    fr, sar = FR(net, mode="class1d"), SAR(net)
    for method in (fr, sar):
        method.trainer = Trainer(**QUIET)
    assert torch.equal(fr.loss(example), sar.loss(example))
    detached = SAR(net, detach_clean=True)
    clean = torch.randn(4, 10, requires_grad=True)
    adv = torch.randn(4, 10, requires_grad=True)
    grads = torch.autograd.grad(detached.distance(clean, adv), (clean, adv), allow_unused=True)
    assert grads[0] is None and grads[1] is not None
    assert SAR(net, domain="softmax").distance(clean, clean + 3).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MART(SmallCNN(), beta=-1), "beta=-1"),
        (lambda: FR(SmallCNN(), mode="3d"), "mode='3d'"),
        (lambda: FR(SmallCNN(), lmbda=-1), "lmbda=-1"),
        (lambda: FR(SmallCNN(), start_epoch=-1), "start_epoch=-1"),
        (lambda: SAR(SmallCNN(), domain="pixels"), "domain='pixels'"),
        (lambda: SAR(SmallCNN(), distance="l0"), "distance='l0'"),
        (lambda: GradAlign(SmallCNN(), lmbda=-1), "lmbda=-1"),
        (lambda: GradAlign(SmallCNN(), FGSM(random_start=True)), "random_start"),
        (lambda: GradAlign(SmallCNN(), NoisyFGSM()), "this attack is random"),
        (lambda: GradAlign(SmallCNN(), FGSM(objective="margin")), "attack.objective is 'margin'"),
        (lambda: GradAlign(SmallCNN(), FGSM(0.5, norm="l2")), "norm"),
        (lambda: NoisyFGSM(k=-1), "k=-1"),
        (lambda: FGSMLAW(SmallCNN(), reference="x"), "reference='x'"),
        (lambda: FGSMLAW(SmallCNN(), label_factor=0), "label_factor=0"),
        (lambda: FGSMLAW(SmallCNN(), accept_below=0), "accept_below=0"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
