"""Attacks that walk: against hand calculations on linear networks, loops over the transforms, and what keep="best" promises."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from robust_pl.callbacks import (
    BIM,
    DIM,
    FGSM,
    MIM,
    NIM,
    PGD,
    SIM,
    TIM,
    VMIM,
    VNIM,
    CWLinf,
    DiverseInputs,
    EoT,
    ScaleCopies,
    Smoothing,
)
from robust_pl.callbacks.attacks.draws import SampleDraws
from robust_pl.callbacks.attacks.eot import ExpectedProblem
from robust_pl.callbacks.attacks.problem import Objective, Problem
from robust_pl.callbacks.attacks.transforms import Transform
from robust_pl.functional import geometry, losses, transfer

from .conftest import CONFIGS
from .test_attacks import Bumpy, Counting, linear

SIDE = 4
PIXELS = 3 * SIDE * SIDE
EPS, STEP = 0.25, 0.1


@pytest.fixture
def task():
    """A linear network of three classes in float64, and images far from the edges of the box."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.4 * torch.randn(3, PIXELS, generator=generator, dtype=torch.float64)  # so that no class is sure
    x = 0.4 + 0.2 * torch.rand(5, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return weight, x, torch.tensor([0, 1, 2, 0, 1])


def by_hand(weight, x, y):
    """Gradient of the cross-entropy of the linear network."""
    softmax = (x.flatten(1) @ weight.T).softmax(1)
    return ((softmax - F.one_hot(y, 3)) @ weight).view_as(x)


def problem_of(net, x, y):
    draws, objective = SampleDraws((0,), torch.arange(len(x))), Objective(losses.cross_entropy, (y,))
    return Problem(net, x, y, eps=EPS, norm="linf", objective=objective, draws=draws, dtype=x.dtype)


def over_mean(gradient):
    return gradient / gradient.abs().mean((1, 2, 3), keepdim=True)


def unit(direction, norm):
    return direction.sign() if norm == "linf" else direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


# One walk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bim_by_hand(task, norm):
    weight, x, y = task
    expected = x
    for _ in range(3):
        expected = expected + 0.1 / 3 * unit(by_hand(weight, expected, y), norm)
    found = BIM(0.1, steps=3, norm=norm)(linear(weight), x, y)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, PGD(0.1, 0.1 / 3, steps=3, norm=norm, random_start=False)(linear(weight), x, y))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_is_the_loop_of_the_paper_bit_by_bit(task, norm):
    weight, x, y = task
    net = linear(weight).float()
    attack = PGD(0.3, steps=6, norm=norm)
    attacked = attack.run(net, x.float(), y)
    expected = attacked.start
    for _ in range(6):
        point = expected.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses.cross_entropy(net(point), y).sum(), point)
        expected = geometry.project(expected + 2.5 * 0.3 / 6 * geometry.steepest(gradient, norm), x.float(), 0.3, norm)
    assert torch.equal(attacked.x_adv, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mim_by_hand(task, norm, decay):
    """Two steps: m1 = g1 / mean|g1|, m2 = decay * m1 + g2 / mean|g2|."""
    weight, x, y = task
    first = over_mean(by_hand(weight, x, y))
    x1 = x + STEP * unit(first, norm)
    second = decay * first + over_mean(by_hand(weight, x1, y))
    found = MIM(EPS, STEP, steps=2, norm=norm, decay=decay)(linear(weight), x, y)
    torch.testing.assert_close(found, x1 + STEP * unit(second, norm))
    without = BIM(EPS, STEP, steps=2, norm=norm)(linear(weight), x, y)
    assert torch.allclose(found, without, atol=1e-4) == (decay == 0)


@pytest.mark.parametrize(("norm", "share"), [("linf", 1.0), ("l2", PIXELS**-0.5)])
def test_nim_by_hand(task, norm, share):
    """The second gradient is that at x1 + step * decay * m1; under l2 the step is shared by the pixels."""
    weight, x, y = task
    first = over_mean(by_hand(weight, x, y))
    x1 = x + STEP * unit(first, norm)
    ahead = x1 + STEP * share * 0.7 * first
    second = 0.7 * first + over_mean(by_hand(weight, ahead, y))
    found = NIM(EPS, STEP, steps=2, norm=norm, decay=0.7)(linear(weight), x, y)
    torch.testing.assert_close(found, x1 + STEP * unit(second, norm))
    assert not torch.allclose(found, MIM(EPS, STEP, steps=2, norm=norm, decay=0.7)(linear(weight), x, y), atol=1e-6)


def neighbours_of(point, x, radius, count):
    """As the attack draws them for samples 0, 1, ... under seed 3."""
    draws = SampleDraws((3, "VMIM", 0), torch.arange(len(x)))
    return [point + radius * (2 * draws.uniform(x) - 1) for _ in range(count)]


@pytest.mark.parametrize(("norm", "share"), [("linf", 1.0), ("l2", PIXELS**-0.5)])
def test_vmim_by_hand(task, norm, share):
    """The second gradient is corrected by mean gradient around x minus gradient at x; seven neighbours, so two groups."""
    weight, x, y = task
    g1 = by_hand(weight, x, y)
    first = over_mean(g1)
    x1 = x + STEP * unit(first, norm)
    around = [by_hand(weight, z, y) for z in neighbours_of(x, x, 1.5 * EPS * share, 7)]
    variance = torch.stack(around).mean(0) - g1
    second = first + over_mean(by_hand(weight, x1, y) + variance)
    attack = VMIM(EPS, STEP, steps=2, norm=norm, neighbours=7, seed=3)
    attacked = attack.run(linear(weight), x, y, index=torch.arange(5))
    torch.testing.assert_close(attacked.x_adv, x1 + STEP * unit(second, norm))
    if norm == "l2":  # the signs are those of MIM
        without = first + over_mean(by_hand(weight, x1, y))
        assert not torch.allclose(attacked.x_adv, x1 + STEP * unit(without, norm), atol=1e-5)
    assert attacked.forwards == attacked.backwards == 5 * (2 + 7)


def test_vnim_looks_ahead_and_tunes_there(task):
    """Its neighbours lie around the point ahead, which for the first step is x."""
    weight, x, y = task
    g1 = by_hand(weight, x, y)
    first = over_mean(g1)
    x1 = x + STEP * first.sign()
    draws = SampleDraws((0, "VNIM", 0), torch.arange(5))
    around = [by_hand(weight, x + 2 * EPS * (2 * draws.uniform(x) - 1), y) for _ in range(3)]
    second = first + over_mean(by_hand(weight, x1 + STEP * first, y) + torch.stack(around).mean(0) - g1)
    found = VNIM(EPS, STEP, steps=2, neighbours=3, beta=2.0).run(linear(weight), x, y, index=torch.arange(5)).x_adv
    torch.testing.assert_close(found, x1 + STEP * second.sign())


@pytest.mark.parametrize("make", [BIM, MIM, NIM, SIM, DIM, TIM, partial(VMIM, neighbours=2), CWLinf])
def test_a_gradient_of_zero_moves_nothing(task, make):
    _, x, y = task
    x_adv = make(0.1, steps=3)(linear(torch.zeros(3, PIXELS, dtype=torch.float64)), x, y)
    assert x_adv.isfinite().all()
    if make is not CWLinf:  # which starts at random
        assert torch.equal(x_adv, x)


def test_tiny_gradients_are_followed(task):
    weight, x, y = task
    found = MIM(EPS, STEP, steps=2, objective="margin")(linear(weight * 1e-200), x, y)
    torch.testing.assert_close(found, MIM(EPS, STEP, steps=2, objective="margin")(linear(weight), x, y))


# Transforms -------------------------------------------------------------------------------------------------------


def test_the_kernel_of_tim_is_that_of_the_card():
    """exp(-t^2 / 2) / sqrt(2 pi) at linspace(-3, 3, 15), its outer product divided by the sum."""
    density = [torch.exp(torch.tensor(-(t**2) / 2, dtype=torch.float64)) for t in torch.linspace(-3, 3, 15).double().tolist()]
    outer = torch.outer(torch.stack(density), torch.stack(density))
    expected = outer / outer.sum()
    impulse = torch.zeros(2, 3, 31, 31, dtype=torch.float64)
    impulse[1, 2, 15, 15] = 2.0
    smoothed = transfer.smooth(impulse, transfer.gaussian(15))
    torch.testing.assert_close(smoothed[1, 2, 8:23, 8:23], 2 * expected, atol=1e-8, rtol=1e-6)
    assert smoothed[0].abs().max() == 0 and smoothed[1, :2].abs().max() == 0
    assert smoothed.sum().item() == pytest.approx(2.0)
    assert transfer.gaussian(15)[7].item() == pytest.approx(0.1712, abs=1e-4)
    ones = transfer.smooth(torch.ones(1, 1, 31, 31), transfer.gaussian(15))
    assert ones[0, 0, 15, 15].item() == pytest.approx(1) and ones[0, 0, 0, 0] < 0.4  # zeros lie outside
    assert torch.equal(Smoothing(1).gradient(impulse), impulse)


def test_tim_follows_the_smoothed_gradient(task):
    weight, x, y = task
    gradient = by_hand(weight, x, y)
    kernel = torch.outer(transfer.gaussian(3), transfer.gaussian(3)).expand(3, 1, 3, 3)
    smoothed = F.conv2d(gradient, kernel, padding=1, groups=3)
    found = TIM(EPS, STEP, steps=1, norm="l2", kernel_size=3)(linear(weight), x, y)
    torch.testing.assert_close(found, x + STEP * unit(smoothed, "l2"))


def test_sim_is_the_mean_over_a_loop_of_scales(task):
    weight, x, y = task
    net = nn.Sequential(linear(weight), nn.Tanh())
    point = x.clone().requires_grad_()
    mean = sum(losses.cross_entropy(net(point / 2**i), y).sum() for i in range(5)) / 5
    (gradient,) = torch.autograd.grad(mean, point)
    torch.testing.assert_close(SIM(EPS).gradient(problem_of(net, x, y), x)[0], gradient)
    attacked = SIM(EPS, STEP, steps=1, norm="l2").run(net, x, y)
    torch.testing.assert_close(attacked.x_adv, x + STEP * unit(gradient, "l2"))
    assert (attacked.forwards, attacked.backwards) == (25, 25)
    assert torch.equal(SIM(0.1, copies=1)(net, x, y), MIM(0.1)(net, x, y))


@pytest.mark.parametrize(("height", "width", "rate"), [(8, 8, 1.5), (32, 32, 1.1), (9, 14, 1.3), (4, 4, 1.1)])
def test_diverse_inputs_are_resize_pad_resize(height, width, rate):
    """Against torch's own operations in a loop over samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 2, height, width, generator=generator, dtype=torch.float64)
    numbers = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    found = transfer.diverse(x, numbers, rate, prob=0.5)
    canvas = [max(side + 1, int(side * rate)) for side in (height, width)]
    paddings = set()
    for image, (chosen, share, top, left), moved in zip(x, numbers.tolist(), found, strict=True):
        if chosen >= 0.5:
            assert torch.equal(moved, image)
            continue
        size = [side + int(share * (most - side)) for side, most in zip((height, width), canvas, strict=True)]
        assert all(side < most for side, most in zip(size, canvas, strict=True))  # at least one pixel of padding
        before = [int(u * (most - side + 1)) for u, side, most in zip((top, left), size, canvas, strict=True)]
        resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False)
        after = [most - side - b for most, side, b in zip(canvas, size, before, strict=True)]
        paddings |= set(zip(before, after, strict=True))
        padded = F.pad(resized, (before[1], after[1], before[0], after[0]))
        expected = F.interpolate(padded, (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(moved, expected)
        assert (moved - image).abs().max() > 0.01
    assert {bool(b) for b, _ in paddings} == {True, False}  # on either side


def test_padding_darkens_a_white_image_by_a_pixel_at_least():
    numbers = torch.rand(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for side in (4, 8, 32):
        white = torch.ones(200, 1, side, side)
        sums = transfer.diverse(white, numbers, 1.1, prob=1.0).flatten(1).sum(1)
        canvas = max(side + 1, int(1.1 * side))
        # Of the canvas, at least one row and one column are black.
        assert (sums <= side**2 * ((canvas - 1) / canvas) ** 2 + 1e-3).all()


def test_diverse_inputs_with_prob_zero_are_the_identity(task):
    weight, x, y = task
    net = linear(weight)
    assert torch.equal(transfer.diverse(x, torch.rand(5, 4), 1.5, prob=0.0), x)
    assert torch.equal(DIM(0.1, prob=0.0)(net, x, y), MIM(0.1)(net, x, y))
    assert not torch.equal(DIM(0.1, prob=1.0, norm="l2")(net, x, y), MIM(0.1, norm="l2")(net, x, y))


def test_every_copy_of_every_sample_draws_for_itself(task):
    weight, x, y = task
    seen = []
    net = linear(weight)
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    same = torch.full_like(x, 0.5)
    MIM(0.1, steps=1, transforms=[ScaleCopies(2), DiverseInputs(2.0, 1.0)]).run(net, same, y, index=torch.arange(5))
    (images,) = seen
    assert images.shape == (10, 3, SIDE, SIDE)
    bright = torch.cat([images[:5], 2 * images[5:]])
    assert len(torch.unique(bright.round(decimals=6).flatten(1), dim=0)) > 6


def test_transforms_combine_as_the_composition_of_functions(task):
    """DTS-MI's gradient is the smoothed one of the mean loss over moved and scaled copies."""
    weight, x, y = task
    numbers = SampleDraws((0, "MIM", 0), torch.arange(5)).few(x, 12).view(5, 3, 4)
    point = x.clone().requires_grad_()
    loss = 0
    for copy in range(3):
        moved = transfer.diverse(point / 2**copy, numbers[:, copy], 1.6, 0.8)
        loss = loss + losses.cross_entropy(linear(weight)(moved), y).sum() / 3
    (gradient,) = torch.autograd.grad(loss, point)
    smoothed = transfer.smooth(gradient, transfer.gaussian(3))
    attack = MIM(EPS, STEP, steps=1, norm="l2", transforms=[ScaleCopies(3), DiverseInputs(1.6, 0.8), Smoothing(3)])
    found = attack.run(linear(weight), x, y, index=torch.arange(5)).x_adv
    torch.testing.assert_close(found, x + STEP * unit(smoothed, "l2"))


def test_transforms_work_in_every_momentum_attack(task):
    """A combined form is the sum of its parts: passes multiply, and the network sees the copies."""
    weight, x, y = task
    for make, passes in ((MIM, 2), (NIM, 2), (partial(VMIM, neighbours=7), 2 + 7), (partial(VNIM, neighbours=7), 2 + 7)):
        model = Counting(linear(weight))
        attacked = make(0.1, steps=2, transforms=[ScaleCopies(3), DiverseInputs(), Smoothing(3)]).run(model, x, y)
        assert attacked.forwards == model.forwards == 5 * 3 * passes
        assert attacked.backwards == model.backwards == 5 * 3 * passes


def test_a_transform_of_a_user_needs_one_method(task):
    weight, x, y = task

    class Flip(Transform):
        def inputs(self, x, problem):
            return x.flip(3)

    flipped = MIM(EPS, STEP, steps=1, transforms=[Flip()])(linear(weight), x, y)
    torch.testing.assert_close(flipped, x + STEP * by_hand(weight, x.flip(3), y).flip(3).sign())


# keep="best" ------------------------------------------------------------------------------------------------------

KEEPING = [
    ("pgd", partial(PGD, 0.15, 0.02)),
    ("pgd_restarts", partial(PGD, 0.15, 0.02, restarts=3)),
    ("pgd_normal", partial(PGD, 0.15, 0.02, random_start="normal")),
    ("pgd_l2", partial(PGD, 0.2, 0.03, norm="l2")),
    ("bim", partial(BIM, 0.15, 0.02)),
    ("mim", partial(MIM, 0.15, 0.02)),
    ("nim", partial(NIM, 0.15, 0.02)),
    ("sim", partial(SIM, 0.15, 0.02)),
    ("tim", partial(TIM, 0.15, 0.02, kernel_size=3)),
    ("dim", partial(DIM, 0.15, 0.02)),
    ("vmim", partial(VMIM, 0.15, 0.02, neighbours=3)),
    ("vnim", partial(VNIM, 0.15, 0.02, neighbours=3)),
    ("dts_mim", partial(MIM, 0.15, 0.02, transforms=[ScaleCopies(3), DiverseInputs(1.3), Smoothing(3)])),
    ("cw_linf", partial(CWLinf, 0.15, 0.02)),
    ("eot", lambda **how: EoT(PGD(0.15, 0.02, **how), 2)),
]


@pytest.fixture
def bumps():
    x = torch.rand(60, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    return Bumpy(), x, torch.zeros(60, dtype=torch.int64)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KEEPING])
def test_with_the_best_kept_more_steps_never_succeed_less(make, bumps):
    model, x, y = bumps
    before, counts = torch.zeros(60, dtype=torch.bool), []
    for steps in (1, 2, 3, 5, 8, 13):
        x_adv = make(steps=steps, keep="best").run(model, x, y, index=torch.arange(60)).x_adv
        fooled = model(x_adv).argmax(1) != y
        assert (fooled | ~before).all()
        before, _ = fooled, counts.append(int(fooled.sum()))
    assert counts[-1] > counts[0]


def test_with_the_last_kept_they_may(bumps):
    """So the test above could fail."""
    model, x, y = bumps
    fooled = [
        model(PGD(0.15, 0.06, steps=steps).run(model, x, y, index=torch.arange(60)).x_adv).argmax(1) != y
        for steps in (1, 2, 3, 5)
    ]
    assert any((before & ~after).any() for before, after in pairwise(fooled))


@pytest.mark.parametrize("make", [partial(PGD, norm="linf"), partial(PGD, norm="l2"), MIM])
def test_with_the_best_kept_a_larger_ball_never_succeeds_less(make, task):
    """On a toy problem on which every ball holds its worst case in a corner."""
    weight, _, _ = task
    weight = weight - weight.mean(1, keepdim=True)  # a grey image is a tie
    x = 0.45 + 0.1 * torch.rand(200, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = linear(weight)
    y = net(x).argmax(1)
    before, counts = torch.zeros(200, dtype=torch.bool), []
    for eps in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        radius = eps * (1 if make is MIM or make.keywords["norm"] == "linf" else PIXELS**0.5)
        fooled = net(make(radius, steps=10, keep="best").run(net, x, y, index=torch.arange(200)).x_adv).argmax(1) != y
        assert (fooled | ~before).all()
        before, _ = fooled, counts.append(int(fooled.sum()))
    assert counts[0] == 0 and counts[-1] == 200 and len(set(counts)) > 3


def test_the_best_is_the_best_of_all_iterates(bumps):
    model, x, y = bumps
    seen = []
    hooked = nn.Sequential(model)
    hooked.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    best = PGD(0.15, 0.06, steps=8, keep="best")(hooked, x, y)
    assert len(seen) == 9  # eight gradients, and the last iterate
    margins = torch.stack([losses.margin(model(point), y) for point in seen])
    fooled = (margins > 0).any(0)
    assert torch.equal(model(best).argmax(1) != y, fooled) and 0 < fooled.sum() < 60
    torch.testing.assert_close(losses.margin(model(best), y)[~fooled], margins.amax(0)[~fooled])
    assert (margins[-1] < margins.amax(0)).any()


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (partial(PGD), 1),
        (partial(PGD, restarts=2), 2),
        (partial(BIM), 1),
        (partial(MIM), 1),
        (partial(TIM, kernel_size=3), 1),
        (partial(VMIM, neighbours=2), 1),
        (partial(CWLinf), 1),
        (partial(NIM), 5),
        (partial(DIM), 5),
        (partial(SIM, copies=2), 5),
    ],
)
def test_what_keeping_the_best_costs(make, extra):
    """One forward pass, or one a step besides, on samples that nothing fools."""
    x, y = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64)
    net = linear(torch.ones(2, 4), torch.tensor([100.0, 0.0]))
    last, best = (make(steps=4, keep=keep).run(net, x, y) for keep in ("last", "best"))
    assert best.forwards - last.forwards == 6 * extra
    assert best.backwards == last.backwards


def test_trades_start_is_not_returned_from_outside_of_the_ball(bumps):
    model, x, _ = bumps
    y = torch.ones(60, dtype=torch.int64)  # wrong from the beginning, so the start is returned
    x_adv = PGD(1e-4, steps=2, random_start="normal", keep="best")(model, x, y)
    assert (x_adv - x).abs().max() <= 1e-4 + 1e-7


# CWLinf -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
def test_cw_rests_where_the_margin_is_kappa(task, targeted):
    weight, x, _ = task
    net = linear(weight)
    y = net(x).argmax(1)
    goal = (y + 1) % 3 if targeted else y
    step = 0.005
    rise = step * 2 * weight.abs().sum(1).max().item()  # at most, in a step

    def margins(kappa):
        x_adv = CWLinf(0.4, step, steps=80, kappa=kappa, targeted=targeted, random_start=False)(net, x, goal)
        margin = losses.margin(net(x_adv), goal).detach()
        return -margin if targeted else margin

    for kappa in (0.0, 1.0, 4.0):
        found = margins(kappa)
        assert (found >= kappa).all() and (found <= kappa + rise).all()
    assert margins(1e6).min() > 4 + 2 * rise


def test_cw_follows_the_margin_of_the_two_logits(task):
    weight, x, y = task
    logits = linear(weight)(x)
    rival = logits.scatter(1, y[:, None], float("-inf")).argmax(1)
    expected = x + STEP * (weight[rival] - weight[y]).view_as(x).sign()
    torch.testing.assert_close(CWLinf(EPS, STEP, steps=1, random_start=False)(linear(weight), x, y), expected)


# EoT --------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A linear network of two classes whose weights are drawn anew in every pass."""

    def __init__(self, weight, noise):
        super().__init__()
        self.weight, self.noise, self.passes = weight, noise, 0

    def forward(self, x):
        self.passes += 1
        drawn = self.weight + self.noise * torch.randn(self.weight.shape, dtype=self.weight.dtype)
        return x.flatten(1) @ drawn.T


def test_the_mean_gradient_of_eot_converges(task):
    """The direction's angle to the true gradient falls like 1 / sqrt(samples)."""
    weight, x, y = task
    errors = []
    for samples in (1, 16, 256):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = Noisy(weight[:2], 0.8)
            attack = EoT(PGD(EPS, STEP, steps=1, norm="l2", random_start=False, objective="margin"), samples)
            step = attack(net, x, y.clamp(max=1)) - x
        assert net.passes == samples
        sign = torch.where(y.clamp(max=1) == 0, 1.0, -1.0).view(-1, 1, 1, 1)
        exact = sign * (weight[1] - weight[0]).view(1, 3, SIDE, SIDE)
        cosine = torch.cosine_similarity(step.flatten(1), exact.flatten(1)).mean().item()
        errors.append((1 / cosine**2 - 1) ** 0.5)  # tangent of the angle: noise over signal
    assert errors[0] > 1.2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(0.1, steps=3, norm="l2", restarts=2),
        PGD(0.1, steps=3, keep="best", objective="kl", seed=4),
        MIM(0.2, steps=3, norm="l2"),
        DIM(0.1, steps=3),
        CWLinf(0.1, kappa=0.5, steps=3),
        FGSM(0.1, targeted=True),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_on_a_deterministic_network_eot_is_the_attack_alone(attack, task):
    weight, x, y = task
    net = nn.Sequential(linear(weight), nn.Tanh())
    wrapped = EoT(attack, 7)
    assert (wrapped.eps, wrapped.norm, wrapped.targeted, wrapped.seed) == (
        attack.eps,
        attack.norm,
        attack.targeted,
        attack.seed,
    )
    attack.name = wrapped.name = "same"  # random numbers belong to the name
    alone, mean = (a.run(net, x, y, index=torch.arange(5)) for a in (attack, wrapped))
    assert torch.equal(mean.x_adv, alone.x_adv)
    assert (mean.forwards, mean.backwards) == (7 * alone.forwards, 7 * alone.backwards)


def test_eot_averages_logits_too(task):
    """With the best kept, iterates are judged by mean logits: a rare flip of the noise is no success."""
    _, x, y = task
    y = y.clamp(max=1)

    class Rare(nn.Module):
        passes = 0

        def forward(self, x):
            self.passes += 1
            sure = F.one_hot(y, 2).to(x) * 4 + 0 * x.sum((1, 2, 3)).unsqueeze(1)
            return -sure if self.passes % 5 == 0 else sure

    start = PGD(0.1, steps=1, random_start=True, keep="best")
    x_adv = EoT(start, 5).run(Rare(), x, y, index=torch.arange(5)).x_adv
    assert (x_adv != x).flatten(1).any(1).all()
    problem = problem_of(Rare(), x, y)
    logits = ExpectedProblem(problem, 5).logits(x)
    torch.testing.assert_close(logits, F.one_hot(y, 2).to(x) * 4 * 3 / 5)
    jacobian, _ = ExpectedProblem(problem, 5).jacobian(x, y.unsqueeze(1))
    assert jacobian.shape == (5, 1, *x.shape[1:])
    assert problem.ledger.forwards.total == 5 * 10 and problem.ledger.backwards.total == 5 * 5


# Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(BIM, steps=0), "steps=0 must be a whole number of at least 1"),
        (partial(PGD, keep="worst"), "keep='worst' is unknown: choose one of last, best, first"),
        (partial(MIM, decay=-0.1), "decay=-0.1 must be a finite number of at least 0"),
        (partial(MIM, step_size=0), "step_size=0 must be above 0"),
        (partial(DIM, resize_rate=1.0), r"resize_rate=1.0 must lie in \(1, 4\]"),
        (partial(DIM, prob=1.5), r"prob=1.5 must lie in \[0, 1\]"),
        (partial(TIM, kernel_size=4), "kernel_size=4 must be odd"),
        (partial(SIM, copies=0), "copies=0 must be at least 1"),
        (partial(VMIM, neighbours=0), "neighbours=0 must be at least 1"),
        (partial(VMIM, beta=0), "beta=0 must be a finite number above 0"),
        (partial(CWLinf, kappa=-1), "kappa=-1 must be a finite number of at least 0"),
        (lambda: EoT(PGD(), samples=0), "samples=0 must be at least 1"),
        (partial(BIM, objective="kl"), "random_start=True or 'normal'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        make()
    assert "\n" not in str(caught.value)


# The command line -------------------------------------------------------------------------------------------------

FRAGMENTS = ["fgsm", "pgd", "bim", "mim", "nim", "dim", "tim", "sim", "vmim", "vnim", "dts_mim", "cw_linf", "eot_pgd"]
FRAGMENTS += ["transfer_mim"]


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_parse(name, robust_pl, tiny, capsys):
    fragment = CONFIGS / "attacks" / f"{name}.yaml"
    with pytest.raises(SystemExit) as stop:
        robust_pl("test", "-c", tiny, "-c", fragment, "--print_config")
    assert stop.value.code == 0
    (parsed,) = yaml.safe_load(capsys.readouterr().out)["attacks"].items()
    written = yaml.safe_load(fragment.read_text())["attacks"][name]
    assert parsed[0] == name and parsed[1]["class_path"].endswith("." + written["class_path"])
    plain = {key: value for key, value in written["init_args"].items() if not isinstance(value, dict | list)}
    assert {key: parsed[1]["init_args"][key] for key in plain} == plain


def test_nested_attacks_and_transforms_run_from_the_command_line(robust_pl, tiny, capsys):
    sources = [CONFIGS / "attacks" / f"{name}.yaml" for name in ("eot_pgd", "dts_mim")]
    attacks = {name: value for path in sources for name, value in yaml.safe_load(path.read_text())["attacks"].items()}
    attacks["eot_pgd"]["init_args"] |= {"samples": 2}
    tiny.with_name("two.yaml").write_text(yaml.safe_dump({"attacks": attacks}))
    robust_pl(
        *("test", "-c", tiny, "-c", "two.yaml", "--trainer.limit_test_batches", 1),
        *("--attacks.eot_pgd.init_args.attack.init_args.steps", 3),
    )
    said = capsys.readouterr().out
    assert "eot_pgd" in said and "dts_mim" in said and "6.00" in said and "50.00" in said
