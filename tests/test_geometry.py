"""Balls and boxes against hand calculations, a bisection and a general optimizer; and how eps is written."""

import copy
import pickle

import pytest
import torch

from robust_pl.callbacks.attacks.draws import SampleDraws, StreamDraws
from robust_pl.callbacks.attacks.problem import Objective, Problem
from robust_pl.functional.geometry import NORMS, project, size, steepest
from robust_pl.functional.losses import cross_entropy
from robust_pl.functional.ratio import Ratio

RADII = {"linf": 0.1, "l2": 0.7, "l1": 2.0}


def images(count=6, side=4, channels=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator, dtype=dtype)


def noise(like, scale, seed=1):
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def column(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def row(*values):
    """One sample (1, 1, 1, W)."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


# Size ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "expected"), [("linf", [4.0, 0.5]), ("l2", [5.0, 0.5]), ("l1", [7.0, 0.5])])
def test_size_by_hand(norm, expected):
    delta = torch.cat([row(3.0, -4.0), row(0.0, -0.5)])
    torch.testing.assert_close(size(delta, norm), torch.tensor(expected, dtype=torch.float64))


# Steepest -----------------------------------------------------------------------------------------------------------


def test_steepest_by_hand():
    gradient = row(3.0, -4.0, 0.0, 0.0)
    assert steepest(gradient, "linf").flatten().tolist() == [1.0, -1.0, 0.0, 0.0]
    torch.testing.assert_close(steepest(gradient, "l2"), row(0.6, -0.8, 0.0, 0.0))
    assert steepest(gradient, "l1").flatten().tolist() == [0.0, -1.0, 0.0, 0.0]  # at least one entry
    assert steepest(gradient, "l1", l1_quantile=0.5).flatten().tolist() == [0.5, -0.5, 0.0, 0.0]
    # Three entries are asked for and two have a gradient: the step is still of size one.
    assert steepest(gradient, "l1", l1_quantile=0.25).flatten().tolist() == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_has_size_one_and_rises(norm):
    gradient = noise(images(), 3.0)
    direction = steepest(gradient, norm)
    torch.testing.assert_close(size(direction, norm), torch.ones(6, dtype=torch.float64))
    assert ((direction * gradient).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2"), ("l1", "linf")])
def test_steepest_reaches_the_dual_norm(norm, dual):
    """No step of size one rises faster than the dual norm of the gradient (for l1 with one pixel a step)."""
    gradient = noise(images(), 1.0)
    rise = (steepest(gradient, norm, l1_quantile=1.0) * gradient).flatten(1).sum(1)
    torch.testing.assert_close(rise, size(gradient, dual))


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_is_a_zero_step(norm):
    direction = steepest(torch.zeros(2, 1, 3, 3), norm)
    assert torch.equal(direction, torch.zeros(2, 1, 3, 3))


def test_steepest_l1_keeps_the_largest_percent():
    gradient = noise(images(3, side=10, channels=3), 1.0)  # 300 entries: 3 are kept
    direction = steepest(gradient, "l1").flatten(1)
    assert (direction != 0).sum(1).tolist() == [3, 3, 3]
    assert torch.equal(direction.abs().topk(3).indices.sort().values, gradient.flatten(1).abs().topk(3).indices.sort().values)


# Project ------------------------------------------------------------------------------------------------------------


def test_project_linf_by_hand():
    x = row(0.5, 0.95, 0.05, 0.5)
    moved = row(0.9, 1.2, -0.3, 0.45)
    torch.testing.assert_close(project(moved, x, 0.1, "linf"), row(0.6, 1.0, 0.0, 0.45))


def test_project_l2_by_hand():
    # delta (0.3, 0.4) has size 0.5; half of it fits; then 0.95 + 0.2 is clipped.
    torch.testing.assert_close(project(row(0.8, 1.35), row(0.5, 0.95), 0.25, "l2"), row(0.65, 1.0))


def test_project_l1_by_hand():
    # |delta| = (0.4, 0.2), budget 0.4: both fall by 0.1.
    torch.testing.assert_close(project(row(0.9, 0.3), row(0.5, 0.5), 0.4, "l1"), row(0.8, 0.4))
    # The second pixel can only rise by 0.05; the first takes what is left: 0.4 - 0.05, so the level is 0.05.
    torch.testing.assert_close(project(row(0.8, 1.45), row(0.4, 0.95), 0.4, "l1"), row(0.75, 1.0))
    # Small entries vanish: |delta| = (0.5, 0.1), budget 0.3, level 0.2.
    torch.testing.assert_close(project(row(0.7, 0.4), row(0.2, 0.5), 0.3, "l1"), row(0.5, 0.5))


def bisection(delta, x, eps):
    """Projection on l1 ball and box of one flat sample, by bisection on the soft threshold."""

    def at(level):
        soft = delta.sign() * (delta.abs() - level).clamp_min(0)
        return torch.minimum(torch.maximum(soft, -x), 1 - x)

    if at(0.0).abs().sum() <= eps:
        return at(0.0)
    low, high = 0.0, delta.abs().max().item()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).abs().sum() > eps else (low, middle)
    return at(high)


@pytest.mark.parametrize("scale", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.5, 3.0, 100.0])
def test_the_l1_projection_agrees_with_bisection(scale, eps):
    x = images(8)
    x[0], x[1] = x[0].round(), 0.5  # pixels at the edges of the box; equal rooms
    delta = noise(x, scale)
    delta[2] = delta[2, 0, 0, 0]  # ties
    found = project(x + delta, x, eps, "l1") - x
    for i in range(len(x)):
        expected = bisection((x + delta - x)[i].flatten(), x[i].flatten(), eps)
        torch.testing.assert_close(found[i].flatten(), expected, atol=1e-10, rtol=0)


def test_the_l1_projection_in_float32_agrees_with_float64():
    x = images(8, side=16)
    delta = noise(x, 0.5)
    exact = project(x + delta, x, 12.0, "l1")
    single = project((x + delta).float(), x.float(), 12.0, "l1")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_l1_projection_is_the_nearest_point(seed):
    """Against a general solver of quadratic programs, in three dimensions."""
    optimize = pytest.importorskip("scipy.optimize")
    x = images(1, side=1, channels=3, seed=seed)
    target = noise(x, 0.8, seed=seed + 10)
    eps = 0.6
    # d = p - q with p, q >= 0 makes the ball linear: sum(p + q) <= eps.
    flat, goal = x.flatten().numpy(), target.flatten().numpy()
    answer = optimize.minimize(
        lambda z: ((z[:3] - z[3:] - goal) ** 2).sum(),
        [0.0] * 6,
        method="SLSQP",
        bounds=[*((0, 1 - v) for v in flat), *((0, v) for v in flat)],
        constraints={"type": "ineq", "fun": lambda z: eps - z.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert answer.success
    found = (project(x + target, x, eps, "l1") - x).flatten()
    torch.testing.assert_close(found, torch.from_numpy(answer.x[:3] - answer.x[3:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_no_feasible_point_is_nearer(norm):
    """linf and l1 are exact: the variational inequality <target - p, q - p> <= 0 holds for any feasible q."""
    x = images(20)
    target = x + noise(x, 0.6)
    nearest = project(target, x, RADII[norm], norm)
    for seed in range(20):
        other = project(x + noise(x, 0.5, seed=100 + seed), x, RADII[norm], norm)
        products = ((target - nearest) * (other - nearest)).flatten(1).sum(1)
        assert products.max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
class TestProjectProperties:
    def test_ends_inside_ball_and_box(self, norm, dtype):
        x = images(dtype=dtype)
        for scale in (0.01, 1.0, 100.0):
            result = project(x + noise(x, scale), x, RADII[norm], norm)
            assert result.dtype == dtype
            assert result.shape == x.shape
            assert result.min() >= 0 and result.max() <= 1
            assert (size(result - x, norm) <= RADII[norm] * (1 + 1e-6)).all()

    def test_far_points_end_on_the_sphere(self, norm, dtype):
        x = torch.full((3, 2, 4, 4), 0.5, dtype=dtype)  # room of 0.5 everywhere: the box is out of the way
        result = project(x + noise(x, 3.0), x, 0.3, norm)
        torch.testing.assert_close(size(result - x, norm), torch.full((3,), 0.3, dtype=dtype))

    def test_twice_is_once(self, norm, dtype):
        x = images(dtype=dtype)
        once = project(x + noise(x, 1.0), x, RADII[norm], norm)
        torch.testing.assert_close(project(once, x, RADII[norm], norm), once)

    def test_points_inside_stay(self, norm, dtype):
        x = 0.25 + images(dtype=dtype) / 2
        inside = x + 0.1 * RADII[norm] * steepest(noise(x, 1.0), norm)
        assert (inside != x).any()
        torch.testing.assert_close(project(inside, x, RADII[norm], norm), inside)
        torch.testing.assert_close(project(x, x, RADII[norm], norm), x)

    def test_eps_zero_returns_x(self, norm, dtype):
        x = images(dtype=dtype)
        # In float64 the l1 level is found up to rounding.
        torch.testing.assert_close(project(x + noise(x, 1.0), x, 0.0, norm), x, atol=1e-14, rtol=0)

    def test_eps_of_each_sample(self, norm, dtype):
        x, eps = images(3, dtype=dtype), column(0.0, 0.05, 0.3).to(dtype)
        moved = x + noise(x, 1.0)
        together = project(moved, x, eps, norm)
        for i in range(3):
            alone = project(moved[i : i + 1], x[i : i + 1], eps[i].item(), norm)
            torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(together[0], x[0], atol=1e-14, rtol=0)

    def test_samples_do_not_see_each_other(self, norm, dtype):
        x = images(dtype=dtype)
        moved = x + noise(x, 1.0)
        order = torch.tensor([4, 0, 5, 2])
        part = project(moved[order], x[order], RADII[norm], norm)
        torch.testing.assert_close(part, project(moved, x, RADII[norm], norm)[order], atol=1e-7, rtol=1e-6)

    def test_inputs_are_not_written_to(self, norm, dtype):
        x = images(dtype=dtype)
        moved = x + noise(x, 1.0)
        before = x.clone(), moved.clone()
        project(moved, x, RADII[norm], norm)
        assert torch.equal(x, before[0]) and torch.equal(moved, before[1])


# Random starts ------------------------------------------------------------------------------------------------------


def problem(x, norm, eps, draws=None):
    y = torch.zeros(len(x), dtype=torch.int64)
    draws = draws or StreamDraws(3, x.device)
    return Problem(
        torch.nn.Flatten(),
        x,
        y,
        eps=eps,
        norm=norm,
        objective=Objective(cross_entropy, (y,)),
        draws=draws,
        dtype=x.dtype,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("source", ["stream", "samples"])
def test_random_starts_are_inside_and_fill_the_ball(norm, source):
    x = torch.full((400, 1, 4, 4), 0.5)
    draws = StreamDraws(3, x.device) if source == "stream" else SampleDraws((0, "a"), torch.arange(400))
    delta = problem(x, norm, 0.2, draws).random_start(True) - x
    sizes = size(delta, norm)
    assert sizes.max() <= 0.2 * (1 + 1e-5)
    assert sizes.unique().numel() > 350
    assert delta.mean().abs() < 0.01  # no preferred side
    if norm == "linf":
        assert delta.var().item() == pytest.approx(0.2**2 / 3, rel=0.05)  # uniform on [-eps, eps]
    else:
        assert sizes.mean().item() == pytest.approx(0.1, rel=0.1)  # the radius is uniform on [0, eps]
        assert sizes.var().item() == pytest.approx(0.2**2 / 12, rel=0.2)


def test_l1_starts_are_laplacian_and_l2_starts_gaussian():
    """E|d|^2 / (E|d|)^2 of the entries tells them apart: pi/2 for a Gaussian, 2 for a Laplacian."""
    x = torch.full((200, 1, 16, 16), 0.5)
    ratios = {}
    for norm in ("l2", "l1"):
        delta = (problem(x, norm, 0.2).random_start(True) - x).flatten(1)
        ratios[norm] = (delta.square().mean(1) / delta.abs().mean(1).square()).mean().item()
    assert ratios["l2"] == pytest.approx(torch.pi / 2, rel=0.03)
    assert ratios["l1"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_respect_box_and_eps_of_each_sample(norm):
    x = images(3, dtype=torch.float32).round()  # black and white: half of each ball lies outside
    eps = torch.tensor([0.0, 0.1, 0.3]).view(-1, 1, 1, 1)
    start = problem(x, norm, eps).random_start(True)
    assert start.min() >= 0 and start.max() <= 1
    assert (size(start - x, norm) <= eps.flatten() * (1 + 1e-5)).all()
    assert torch.equal(start[0], x[0])
    assert (start[2] != x[2]).any()


def test_other_starts():
    x = torch.full((50, 1, 8, 8), 0.5)
    assert torch.equal(problem(x, "linf", 0.1).random_start(False), x)
    delta = problem(x, "linf", 0.1).random_start("normal") - x
    assert delta.std().item() == pytest.approx(0.001, rel=0.05)
    assert delta.mean().abs() < 1e-4


# Ratio --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8/255", 8 / 255),
        ("0.5", 0.5),
        (" 4 / 255 ", 4 / 255),
        (0.25, 0.25),
        (2, 2.0),
        ("1e-3", 1e-3),
        ("128/255", 128 / 255),
    ],
)
def test_ratio_reads(written, value):
    assert Ratio(written) == value
    assert isinstance(Ratio(written), float)


@pytest.mark.parametrize("text", ["8/255", "0.5", "2.0", "0.1"])
def test_ratio_keeps_its_text(text):
    ratio = Ratio(text)
    assert str(ratio) == repr(ratio) == text
    for again in (Ratio(str(ratio)), Ratio(ratio), copy.deepcopy(ratio), pickle.loads(pickle.dumps(ratio))):
        assert again == ratio
        assert str(again) == text


@pytest.mark.parametrize("text", ["", "eight", "/255", "8/0", "1/2/3", "8//255", "8:255", "None", "True"])
def test_ratio_refuses(text):
    with pytest.raises(ValueError, match=r"write 0\.03 or a fraction such as 8/255"):
        Ratio(text)


def test_ratio_computes_like_a_float():
    assert 2.5 * Ratio("8/255") / 10 == pytest.approx(2 / 255)
    assert torch.equal(torch.ones(2) * Ratio("1/4"), torch.full((2,), 0.25))
