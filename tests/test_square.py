"""Square: its proposals by hand, and what it breaks beside the official code."""

import pytest
import torch

from robust_pl.callbacks import Square
from robust_pl.callbacks.attacks.draws import SampleDraws
from robust_pl.callbacks.attacks.squares import SquareProposal, move_mass, pattern, recolour_square
from robust_pl.functional.geometry import size
from tests.test_query_attacks import Logits


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Square's proposals -----------------------------------------------------------------------------------------------


def test_the_pattern_by_hand():
    """Side 3: one row, with 1 + 1/4 in the middle and 1/4 beside it, above the negative of two rows."""
    upper = torch.tensor([[0.25, 1.25, 0.25]]) / 1.6875**0.5
    lower = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]]) / 1.875**0.5
    upright, turned = pattern(3, "l2", torch.float32, torch.device("cpu"))
    torch.testing.assert_close(upright, torch.cat([upper, -lower]) / 2**0.5)
    torch.testing.assert_close(turned, upright.T)

    upper = torch.tensor([[1, 17, 1]]) / 19  # in units of 1/16
    lower = torch.tensor([[1, 1, 1], [1, 17, 1]]) / 22
    torch.testing.assert_close(pattern(3, "l1", torch.float32, torch.device("cpu"))[0], torch.cat([upper, -lower]) / 2)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 3, 7, 12])
def test_patterns_have_size_one(norm, side):
    for turned in pattern(side, norm, torch.float64, torch.device("cpu")):
        assert size(turned[None], norm).item() == pytest.approx(1.0)
        assert (turned != 0).all()


def test_the_schedule():
    x = torch.empty(1, 3, 32, 32)
    linf, l2 = SquareProposal("linf"), SquareProposal("l2")
    iterations = [0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert [linf.side(x, i) for i in iterations] == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert [l2.side(x, i) for i in iterations] == [29, 29, 21, 21, 15, 11, 7, 5, 5, 3, 3, 3]
    rescaled = SquareProposal("linf", rescale_to=1000)
    assert [rescaled.side(x, i) for i in (0, 1, 2, 999)] == [29, 29, 20, 1]
    assert SquareProposal("l2", 1.0).side(torch.empty(1, 1, 4, 4), 0) == 4  # no larger than the image


def test_a_square_is_recoloured_by_hand():
    x = torch.full((3, 2, 5, 6), 0.5)
    x[2] = 0.95
    # Corners (0, 0), the last (3, 4), and (1, 2) of the 4 x 5 places for squares of side 2.
    few = torch.tensor([[0.0, 0.0, 0.1, 0.9], [0.999, 0.999, 0.9, 0.1], [0.3, 0.5, 0.1, 0.1]], dtype=torch.float64)
    x_new = recolour_square(x, x, 0.1, 2, few)
    expected = torch.zeros_like(x)
    expected[0, 0, :2, :2], expected[0, 1, :2, :2] = 0.1, -0.1
    expected[1, 0, 3:, 4:], expected[1, 1, 3:, 4:] = -0.1, 0.1
    expected[2, :, 1:3, 2:4] = 0.05  # the box
    torch.testing.assert_close(x_new - x, expected)
    # What was there before inside the square does not matter, and stays outside of it.
    torch.testing.assert_close(recolour_square(x - 0.03, x, 0.1, 2, few) - x, torch.where(expected == 0, -0.03, expected))


def test_windows_reach_every_place():
    x = torch.zeros(4000, 1, 5, 5)
    few = SampleDraws((0,), torch.arange(4000)).few(x, 3)
    few[:, 2] = 0
    moved = recolour_square(x, x, 1.0, 2, few).sum(0)[0] / 4000
    corners = torch.zeros(5)
    corners[:4] += 0.25
    corners[1:] += 0.25
    torch.testing.assert_close(moved, torch.outer(corners, corners), atol=0.03, rtol=0)


def moved_by_hand(delta, eps, side, few, norm):
    """One sample (C, H, W), pixel by pixel as the paper and AutoAttack's code say."""
    length = (lambda d: d.pow(2).sum().sqrt()) if norm == "l2" else (lambda d: d.abs().sum())
    places = delta.shape[1] - side + 1
    r1, c1, r2, c2 = (few[:4] * places).long().tolist()
    shape = pattern(side, norm, delta.dtype, delta.device)[int(few[4] < 0.5)]
    union = torch.zeros_like(delta, dtype=torch.bool)
    union[:, r1 : r1 + side, c1 : c1 + side] = True
    union[:, r2 : r2 + side, c2 : c2 + side] = True
    new = delta.clone()
    new[:, r2 : r2 + side, c2 : c2 + side] = 0
    for c in range(len(delta)):
        old = delta[c, r1 : r1 + side, c1 : c1 + side]
        window = shape * (1.0 if few[5 + c] < 0.5 else -1.0) + old / length(old)
        if norm == "l2":
            target = ((eps**2 - length(delta) ** 2).clamp_min(0) / len(delta) + length(delta[c][union[c]]) ** 2).sqrt()
        else:
            target = ((eps - length(delta)).clamp_min(0) / len(delta) + length(delta[c][union[c]])) * len(delta)
        new[c, r1 : r1 + side, c1 : c1 + side] = window / length(window) * target
    return new


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [3, 5])
def test_mass_is_moved_by_hand(norm, side):
    generator = torch.Generator().manual_seed(0)
    x = torch.full((6, 2, 7, 7), 0.5, dtype=torch.float64)
    delta = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    delta = 0.25 * delta / size(delta, norm).view(-1, 1, 1, 1)
    eps = torch.tensor(0.3, dtype=torch.float64)
    few = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    found = move_mass(x + delta, x, 0.3, side, few, norm) - x
    for i in range(len(x)):
        expected = moved_by_hand(delta[i], eps, side, few[i], norm)
        if norm == "l2":
            expected = expected * (0.3 / expected.norm())
        else:  # the projection on the ball takes the same from all pixels
            low, high = 0.0, 1.0
            for _ in range(60):
                level = (low + high) / 2
                low, high = (level, high) if (expected.abs() - level).clamp_min(0).sum() > 0.3 else (low, level)
            expected = expected.sign() * (expected.abs() - low).clamp_min(0)
        torch.testing.assert_close(found[i], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 16, 20), (1, 4, 3)])
def test_starts_and_proposals_fill_the_ball(norm, shape):
    """On images far from the edges of the box."""
    x = 0.4 + 0.2 * torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    draws, propose = SampleDraws((0,), torch.arange(5)), SquareProposal(norm)
    x_adv = propose.start(x, 0.05, draws)
    torch.testing.assert_close(size(x_adv - x, norm), torch.full((5,), 0.05), atol=1e-5, rtol=0)
    assert len(torch.unique((x_adv - x).flatten(1), dim=0)) > 1
    for iteration in (0, 30, 3000):
        x_adv = propose(x_adv, x, 0.05, iteration, draws.few(x, propose.numbers(x)))
        torch.testing.assert_close(size(x_adv - x, norm), torch.full((5,), 0.05), atol=1e-5, rtol=0)


# Square beside AutoAttack's -----------------------------------------------------------------------------------------

# What stands after the official code alone, 5000 queries, seed 0, on the network below, and after all of AutoAttack.
OFFICIAL = {
    "linf": (0.006, {2, 10, 15, 34, 39, 49, 62}),
    "l2": (0.08, {4, 6, 14, 18, 20, 23, 26, 27, 42, 53, 55, 58, 60, 63}),
    "l1": (1.0, {2, 5, 10, 19, 25, 39, 49}),
}
WORST = {
    "linf": {3, 7, 9, 11, 13, 17, 21, 29, 30, 33, 35, 36, 41, 44, 45, 47, 50, 51, 57, 59, 61},
    "l2": {1, 2, 3, 5, 7, 9, 10, 11, 13, 15, 17, 19, 21, 25, 29, 30, 33, 34, 35, 36, 39, 41, 44, 45, 47, 49, 50, 51, 54, 57}
    | {59, 61, 62},
    "l1": {3, 7, 9, 11, 13, 15, 17, 21, 29, 30, 33, 34, 35, 36, 41, 44, 45, 47, 50, 51, 57, 59, 61, 62},
}


def still_standing(norm, seed, **how):
    """Names of the samples that Square cannot break, and queries of each that was right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 16, 16, generator=generator)
    first = torch.randn(64, 768, generator=generator) / 768**0.5
    second = torch.randn(10, 64, generator=generator) / 64**0.5
    net = Logits(lambda x: torch.relu((x.flatten(1) - 0.5) @ first.T * 8) @ second.T)
    y = net(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)
    eps, _ = OFFICIAL[norm]
    found = Square(eps, norm=norm, seed=seed, **how).run(net, x[right], y[right], index=right)
    queries = found.forward_passes.of_each
    stands = net(found.x_adv).argmax(1) == y[right]
    assert (queries[stands] == 5000).all()
    return set(right[stands].tolist())


def test_square_linf_is_the_official_code():
    """Seeds 0 to 3 of the official code leave 28, 27, 28 and 27, those of ours 26, 27, 27, 27; two break sample 10."""
    stands = still_standing("linf", seed=1)
    assert len(stands ^ (WORST["linf"] | OFFICIAL["linf"][1])) <= 1


@pytest.mark.slow
def test_with_every_place_for_its_windows_square_breaks_a_few_more_and_none_that_all_of_autoattack_cannot():
    stands = still_standing("linf", seed=0, reach_border=True)
    assert WORST["linf"] <= stands <= WORST["linf"] | OFFICIAL["linf"][1]
    assert 23 <= len(stands) <= 26


def test_windows_stay_off_the_last_row_and_column_unless_they_may_reach_it():
    x = torch.zeros(4000, 1, 5, 6)
    few = SampleDraws((0,), torch.arange(4000)).few(x, 3)
    few[:, 2] = 0
    for reach_border in (False, True):
        propose = SquareProposal("linf", p_init=0.13, reach_border=reach_border)
        assert propose.side(x, 0) == 2
        moved = propose(x + 0.5, x + 0.5, 0.1, 0, few) > 0.55
        assert moved[:, 0, -1].any() == moved[:, 0, :, -1].any() == reach_border
        assert moved[:, 0, -2].any() and moved[:, 0, :, -2].any() and moved[:, 0, 0].any() and moved[:, 0, :, 0].any()


@pytest.mark.slow
def test_square_l2_is_the_official_code():
    assert len(still_standing("l2", seed=0) ^ (WORST["l2"] | OFFICIAL["l2"][1])) <= 1


@pytest.mark.slow
def test_square_l1_is_the_official_code():
    """Other seeds break other samples at the rim, on both sides: seeds 1 and 2 of the official code differ from its seed 0 by
    two samples, seeds 0 to 3 of ours by two, four, one and two.
    """
    stands = still_standing("l1", seed=2)
    assert len(stands ^ (WORST["l1"] | OFFICIAL["l1"][1])) <= 1
