"""Distributions of viewpoints: density, entropy, draws, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust_pl.callbacks import ViewDistribution
from robust_pl.callbacks.viewpoints import distribution as distribution_module
from robust_pl.callbacks.viewpoints.distribution import UniformViews, space_of_record, space_record
from robust_pl.callbacks.viewpoints.draws import ObjectDraws
from robust_pl.functional.evolution import tanh_gaussian_entropy
from robust_pl.scenes import ViewSpace

ANGLES = ViewSpace(phi=(10, 80), active=["theta", "phi"])


def mixture(kind: str = "joint", ids: tuple[str, ...] = ("cup", "cow", "duck")) -> ViewDistribution:
    """Two components in two coordinates, other ones for each object."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, 2, generator=generator)
    sigma = 0.1 + 0.2 * torch.rand(3, 2, 2, generator=generator)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    if kind == "per_dim":
        weights = torch.stack([weights, weights.flip(1)], 2)
    return ViewDistribution(weights, mean, sigma, ANGLES, list(ids), kind, {"made": "by hand"})


def normal(u: float, mean: Tensor, sigma: Tensor) -> float:
    return math.exp(-0.5 * ((u - mean.item()) / sigma.item()) ** 2) / (sigma.item() * math.sqrt(2 * math.pi))


def test_density_by_hand() -> None:
    u = torch.tensor([0.3, -0.6])
    stretch = 180 * (1 - math.tanh(0.3) ** 2) * 35 * (1 - math.tanh(-0.6) ** 2)  # |dv / du|
    joint, per_dim = mixture(), mixture("per_dim")
    m, s = joint.mean[0], joint.sigma[0]
    first, second = ([normal(u[d].item(), m[k, d], s[k, d]) for d in range(2)] for k in range(2))
    by_hand = (0.25 * first[0] * first[1] + 0.75 * second[0] * second[1]) / stretch
    found = joint.log_prob(u.expand(3, 1, 2))
    assert found.shape == (3, 1)
    assert found[0, 0].item() == pytest.approx(math.log(by_hand), abs=1e-4)
    by_hand = (0.25 * first[0] + 0.75 * second[0]) * (0.75 * first[1] + 0.25 * second[1]) / stretch
    assert per_dim.log_prob(u.expand(3, 1, 2))[0, 0].item() == pytest.approx(math.log(by_hand), abs=1e-4)


@pytest.mark.parametrize("kind", ["joint", "per_dim"])
def test_density_integrates_to_one(kind: str) -> None:
    found = mixture(kind)
    side = torch.linspace(-5, 5, 401)
    grid = torch.cartesian_prod(side, side).expand(3, -1, -1)
    mass = (found.log_prob(grid) + ANGLES.log_abs_det(grid)).exp().sum(1) * (side[1] - side[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-3, rtol=0)


def test_entropy_of_one_gaussian_is_that_of_its_coordinates() -> None:
    mean, sigma = torch.tensor([[[0.4, -0.8]], [[0.0, 0.0]]]), torch.tensor([[[0.1, 0.3]], [[0.87, 0.87]]])
    found = ViewDistribution(torch.ones(2, 1), mean, sigma, ANGLES, ["a", "b"])
    exact = tanh_gaussian_entropy(mean, sigma).sum((1, 2)) + math.log(180) + math.log(35)
    torch.testing.assert_close(found.entropy(50_000), exact, atol=0.02, rtol=0)
    assert (found.entropy() == found.entropy()).all()
    assert (found.entropy() < ANGLES.log_volume).all()
    assert exact[1].item() == pytest.approx(ANGLES.log_volume - 2 * (math.log(2) - 0.683), abs=2e-3)


@pytest.mark.parametrize("kind", ["joint", "per_dim"])
def test_draws_have_the_moments_of_the_mixture(kind: str) -> None:
    found = mixture(kind)
    u, view = found.sample(20_000, seed=3)
    torch.testing.assert_close(view, ANGLES.squash(u))
    weights = found.weights.unsqueeze(2) if kind == "joint" else found.weights
    mean = (weights * found.mean).sum(1)
    variance = (weights * (found.sigma**2 + found.mean**2)).sum(1) - mean**2
    torch.testing.assert_close(u.mean(1), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(u.var(1), variance, atol=0.03, rtol=0.03)
    # Joint: both coordinates of a view are of one component. Per coordinate they are independent.
    away = u - mean.unsqueeze(1)
    together = (away[..., 0] * away[..., 1]).mean(1)
    expected = (weights[..., 0] * (found.mean - mean.unsqueeze(1)).prod(2)).sum(1) if kind == "joint" else torch.zeros(3)
    torch.testing.assert_close(together, expected, atol=0.03, rtol=0)


def test_entropy_does_not_depend_on_how_many_are_worked_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    many = ViewDistribution(torch.full((5, 2), 0.5), mean, torch.full_like(mean, 0.1), ANGLES, list("abcde"))
    whole = many.entropy(50)
    held: list[int] = []
    log_prob = ViewDistribution.log_prob
    monkeypatch.setattr(ViewDistribution, "log_prob", lambda self, u: held.append(len(u)) or log_prob(self, u))
    monkeypatch.setattr(distribution_module, "_AT_ONCE", 50 * 4 * 2)
    assert torch.equal(many.entropy(50), whole) and held == [2, 2, 1]


def test_draws_belong_to_the_seed_and_the_object() -> None:
    found = mixture()
    u, _ = found.sample(7, seed=1)
    alone, _ = found.of(["duck", "cup"]).sample(7, seed=1)
    assert torch.equal(alone, u[[2, 0]])
    assert not torch.equal(found.sample(7, seed=2)[0], u)
    assert len({tuple(row) for row in u.flatten(0, 1).tolist()}) == 21
    before = torch.get_rng_state()
    found.sample(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_components_come_up_their_share_of_times() -> None:
    weights = torch.tensor([[[0.5], [0.3], [0.2]], [[1.0], [0.0], [0.0]]])
    chosen = ObjectDraws(0, ["a", "b"]).components("c", weights, 10)
    counts = torch.stack([(chosen == k).sum(1).squeeze(1) for k in range(3)], 1)
    assert counts[1].tolist() == [10, 0, 0]
    assert (counts[0] - torch.tensor([5, 3, 2])).abs().max() <= 1
    means = torch.stack([(ObjectDraws(s, ["a"]).components("c", weights[:1], 3) == 0).float().mean() for s in range(300)])
    assert means.mean().item() == pytest.approx(0.5, abs=0.03)  # also where shares are no whole numbers
    both = ObjectDraws(0, ["a"]).components("c", torch.full((1, 2, 2), 0.5), 1000).float().squeeze(0)
    assert abs((both[:, 0] * both[:, 1]).mean().item() - 0.25) < 0.05  # columns are independent


def test_center_is_at_the_means() -> None:
    found = mixture()
    assert found.center.shape == (3, 2, 6)
    torch.testing.assert_close(found.center[1, 0, 1], 180 * found.mean[1, 0, 0].tanh())
    assert (found.center[..., 3] == 4.0).all() and (found.center[..., 0] == 0.0).all()


@pytest.mark.parametrize("kind", ["joint", "per_dim"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    found = mixture(kind)
    found.save(tmp_path / "new" / "views.safetensors")
    again = ViewDistribution.load(tmp_path / "new" / "views.safetensors")
    for name in ("weights", "mean", "sigma"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert (again.ids, again.mixture, again.settings) == (found.ids, kind, {"made": "by hand"})
    assert space_record(again.space) == space_record(ANGLES)
    assert torch.equal(again.sample(5)[1], found.sample(5)[1])
    torch.testing.assert_close(again.log_prob(again.sample(5)[0]), found.log_prob(found.sample(5)[0]))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no view distribution at .*absent"):
        ViewDistribution.load(tmp_path / "absent.safetensors")
    path = tmp_path / "views.safetensors"
    mixture().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        ViewDistribution.load(path)


def test_spaces_are_equal_where_their_records_are() -> None:
    space = ViewSpace(r=(2, 3), active="position", fixed={"phi": 20.0})
    assert space_record(space_of_record(space_record(space))) == space_record(space)
    assert space_record(ViewSpace(r=(2, 3), active=["theta"])) == space_record(ViewSpace(active=["theta"]))
    assert space_record(ViewSpace(theta=(-90, 90))) != space_record(ViewSpace())
    cancelled = ViewSpace(normalize_radius=1.5)
    assert space_of_record(space_record(cancelled)).normalize_radius == 1.5
    assert space_record(cancelled) != space_record(ViewSpace())


def test_uniform_views_fill_the_space() -> None:
    u, view = UniformViews(ANGLES, ["a", "b"]).sample(20_000, seed=1)
    assert u.isfinite().all() and ANGLES.contains(view).all()
    torch.testing.assert_close(view[..., 1].mean(), torch.tensor(0.0), atol=2.0, rtol=0)
    torch.testing.assert_close(view[..., 2].std(), torch.tensor(70 / math.sqrt(12)), atol=0.3, rtol=0)
    assert not torch.equal(u[0], u[1])
    assert UniformViews(ANGLES, ["a", "b"]).entropy().tolist() == pytest.approx([math.log(360 * 70)] * 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": torch.zeros(3, 2, 3)}, "2 active parameters"),
        ({"weights": torch.full((3, 2, 2), 0.5)}, "do not fit mean"),
        ({"mixture": "per_dim"}, "mixture='per_dim' has weights"),
        ({"mixture": "both"}, "choose one of joint, per_dim"),
        ({"sigma": torch.zeros(3, 2, 2)}, "sigma above 0"),
        ({"mean": torch.full((3, 2, 2), math.nan)}, "must be finite"),
        ({"weights": torch.full((3, 2), 0.4)}, "sum to 1"),
        ({"ids": ["cow", "cow", "cup"]}, "twice"),
    ],
)
def test_bad_distributions(change: dict, says: str) -> None:
    good = mixture()
    arguments = {"weights": good.weights, "mean": good.mean, "sigma": good.sigma, "space": ANGLES, "ids": good.ids}
    with pytest.raises(ValueError, match=says):
        ViewDistribution(**arguments | change)


def test_objects_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no object 'horse', only cup, cow, duck"):
        mixture().of(["cow", "horse"])
