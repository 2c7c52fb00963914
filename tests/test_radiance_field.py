"""The radiance field against closed forms, hand interpolation and finite differences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust_pl.functional.harmonics import harmonics
from robust_pl.scenes import RadianceField, Renderer, ViewSpace
from robust_pl.scenes import field as field_module
from robust_pl.scenes.field import OPACITY
from robust_pl.scenes.renderer import pixel_rays


def raw(field: RadianceField, sigma: float) -> float:
    """The grid's value for a density."""
    return math.log(math.expm1(sigma * field.diagonal / OPACITY))


def poses(number: int) -> Tensor:
    space = ViewSpace()
    return space.to_matrix(space.uniform(torch.rand(number, space.dim, generator=torch.Generator().manual_seed(0))))


def radii(field: RadianceField) -> Tensor:
    """Distance of each node from the origin, (Z, Y, X)."""
    axes = [torch.linspace(-1, 1, count) for count in field.density.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)


@pytest.fixture
def ball() -> RadianceField:
    """A soft ball of random colours, in a box that is empty otherwise."""
    field = RadianceField((20, 24), resolution=24, samples=40).requires_grad_(False)
    field.density[0, 0] = (50 * (0.6 - radii(field))).clamp(-16, 3)
    field.color.normal_(generator=torch.Generator().manual_seed(1))
    return field


def test_a_box_of_constant_density_against_the_closed_form() -> None:
    field = RadianceField((9, 11), resolution=4, low=(-1, -0.5, -1), high=(1, 0.5, 0.25), samples=8, cutoff=0)
    with torch.no_grad():
        field.density.fill_(raw(field, 0.8))
        field.color.view(3, -1).copy_(math.sqrt(4 * math.pi) * torch.tensor([[0.0], [math.log(3)], [-math.log(3)]]))
    pose = poses(5)
    views = field.render(pose)
    origin, direction = (rays.double() for rays in pixel_rays(pose, (9, 11), 39.6))
    begin, end = torch.zeros(5, 9, 11, dtype=torch.float64), torch.full((5, 9, 11), torch.inf, dtype=torch.float64)
    for axis, (low, high) in enumerate(((-1, 1), (-0.5, 0.5), (-1, 0.25))):
        sides = [(side - origin[:, None, None, axis]) / direction[..., axis] for side in (low, high)]
        begin, end = torch.maximum(begin, torch.minimum(*sides)), torch.minimum(end, torch.maximum(*sides))
    alpha = 1 - torch.exp(-0.8 * (end - begin).clamp(min=0))
    assert 0 < (alpha > 0).double().mean() < 1
    torch.testing.assert_close(views.alpha[:, 0].double(), alpha, atol=2e-6, rtol=0)
    colors = torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(views.rgb.double(), colors * alpha.unsqueeze(1), atol=2e-6, rtol=0)


def test_a_ball_of_constant_density_against_the_closed_form() -> None:
    field = RadianceField(resolution=96, samples=400)
    with torch.no_grad():
        field.density[0, 0] = torch.where(radii(field) < 0.6, raw(field, 2.0), -30.0)
    beside = torch.tensor([0.0, 0.2, 0.4, 0.5, 0.7])
    origin = torch.stack([beside, torch.zeros(5), torch.full((5,), 3.0)], 1)
    alpha = field(origin, torch.tensor([0.0, 0.0, -1.0]).expand(5, 3))[3]
    expected = 1 - torch.exp(-2.0 * 2 * (0.36 - beside**2).clamp(min=0).sqrt())
    torch.testing.assert_close(alpha, expected, atol=0.03, rtol=0)  # a cell of 0.021 at each side of the surface


def test_trilinear_interpolation_by_hand() -> None:
    field = RadianceField(resolution=2).double()
    corners = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0], dtype=torch.float64)
    with torch.no_grad():
        field.density.copy_(corners.view(1, 1, 2, 2, 2))  # z, y, x: the number has the bits zyx
    x, y, z = 0.25, 0.5, 0.75  # as shares of the box
    by_hand = sum(
        value * (x if n & 1 else 1 - x) * (y if n & 2 else 1 - y) * (z if n & 4 else 1 - z)
        for n, value in enumerate(corners.tolist())
    )
    where = torch.tensor([[2 * x - 1], [2 * y - 1], [2 * z - 1]], dtype=torch.float64)
    sigma = OPACITY / math.sqrt(12) * math.log1p(math.exp(by_hand))
    assert field.sigma(where).item() == pytest.approx(sigma, abs=1e-12)


def test_the_world_has_x_y_z_in_the_order_of_the_poses() -> None:
    field = RadianceField((5, 5), resolution=9).requires_grad_(False)
    field.density.fill_(-30.0)
    field.density[0, 0, 6:, 4, 4] = 5.0  # a rod from the middle upwards, along z
    from_the_side = ViewSpace(active="angles").to_matrix(torch.tensor([[0.0, 0, 90, 4, 0, 0]]))
    alpha = field.render(from_the_side).alpha[0, 0]
    assert alpha[1, 2] > 0.5 and alpha[3, 2] < 1e-3 and alpha[:, 0].max() < 1e-3


def test_harmonics_are_orthonormal() -> None:
    direction = torch.randn(3, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = harmonics(direction / direction.norm(dim=0), 2)
    torch.testing.assert_close(
        4 * math.pi * values @ values.T / values.shape[1], torch.eye(9, dtype=torch.float64), atol=0.02, rtol=0
    )


def test_skipping_changes_nothing_beyond_what_is_stated(ball: RadianceField) -> None:
    whole = RadianceField(**{**ball.settings, "empty": 0.0, "cutoff": 0.0})
    whole.load_state_dict(ball.state_dict())
    seen, all_of_it = ball.render(poses(3)), whole.render(poses(3))
    assert 0.05 < ball.occupied().float().mean() < 0.5  # something is skipped
    lost = all_of_it.alpha - seen.alpha
    assert lost.min() >= -1e-6 and lost.max() <= ball.empty
    assert (all_of_it.rgb - seen.rgb).abs().max() <= ball.empty + 2 * ball.cutoff
    assert all_of_it.alpha.max() > 0.99


def test_what_is_empty_follows_the_density(ball: RadianceField) -> None:
    before = ball.occupied()
    assert ball.occupied() is before
    assert ball.radius == pytest.approx(math.sqrt(3) * 0.9, abs=0.35)
    ball.density.fill_(-30.0)
    assert not ball.occupied().any()
    assert ball.render(poses(2)).alpha.max() < 1e-9
    assert ball.radius == pytest.approx(math.sqrt(3))
    ball.density.fill_(1.0)
    assert ball.occupied().all()


def test_poses_do_not_depend_on_each_other_and_repeat_bit_for_bit(ball: RadianceField) -> None:
    pose = poses(70)  # several chunks
    views = ball.render(pose)
    assert torch.equal(ball.render(pose).rgb, views.rgb)
    alone = [ball.render(one.unsqueeze(0)) for one in pose]
    torch.testing.assert_close(views.rgb, torch.cat([view.rgb for view in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(views.alpha, torch.cat([view.alpha for view in alone]), atol=1e-5, rtol=0)
    assert views.rgb.min() >= 0 and (views.rgb <= views.alpha + 1e-6).all() and views.alpha.max() <= 1
    assert isinstance(ball, Renderer)


def test_a_call_holds_few_rays_however_many_poses(ball: RadianceField, monkeypatch: pytest.MonkeyPatch) -> None:
    pose, held, forward = poses(7), [], RadianceField.forward
    whole = ball.render(pose)
    monkeypatch.setattr(field_module, "RAYS", 2 * ball.image_size[0] * ball.image_size[1] + 5)
    monkeypatch.setattr(RadianceField, "forward", lambda self, *rays: held.append(len(rays[0])) or forward(self, *rays))
    parts = ball.render(pose)
    torch.testing.assert_close(parts.rgb, whole.rgb, atol=1e-5, rtol=0)
    assert max(held) == 2 * ball.image_size[0] * ball.image_size[1] and len(held) == 4
    assert ball.render(pose[:0]).rgb.shape == (0, 3, *ball.image_size)


def test_gradients_of_poses_and_grid_against_finite_differences() -> None:
    field = RadianceField((3, 3), resolution=3, samples=5, degree=1, empty=0, cutoff=0, near=0.1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        field.density.copy_(torch.randn(field.density.shape, generator=generator) - 3)
        field.color.copy_(torch.randn(field.color.shape, generator=generator))
    space = ViewSpace()
    view = torch.tensor([[10.0, 33.0, 41.0, 3.7, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)

    def seen(view: Tensor, density: Tensor, color: Tensor) -> Tensor:
        origin, direction = pixel_rays(space.to_matrix(view), field.image_size, field.fov_x)
        rays = direction.flatten(1, 2)
        inputs = (origin.unsqueeze(1).expand_as(rays).flatten(0, 1), rays.flatten(0, 1))
        return torch.func.functional_call(field, {"density": density, "color": color}, inputs)

    rest = (field.density.detach().requires_grad_(), field.color.detach().requires_grad_())
    assert torch.autograd.gradcheck(seen, (view, *rest), fast_mode=True)
    views = field.render(space.to_matrix(view))
    views.rgb.sum().backward()
    assert view.grad is not None and (view.grad.abs() > 0).any() and field.color.grad is not None


def test_a_finer_grid_holds_the_same_field(ball: RadianceField) -> None:
    before = ball.render(poses(2))
    ball.refine(47)  # its nodes are the old ones and those halfway between
    assert ball.density.shape == (1, 1, 47, 47, 47) and not ball.density.requires_grad
    after = ball.render(poses(2))
    torch.testing.assert_close(after.rgb, before.rgb, atol=0.012, rtol=0)  # other cells are skipped


def test_a_camera_inside_the_box_sees_what_is_in_front_of_it() -> None:
    field = RadianceField((1, 1), resolution=2, samples=4, near=0.5)
    with torch.no_grad():
        field.density.fill_(raw(field, 1.0))
    pose = torch.eye(4).unsqueeze(0)  # at the origin, looking down
    assert field.render(pose).alpha.item() == pytest.approx(1 - math.exp(-0.5), abs=1e-6)


def test_a_camera_that_looks_away_sees_nothing(ball: RadianceField) -> None:
    pose = torch.eye(4).unsqueeze(0)
    pose[0, 2, 3] = -5.0  # below the box, looking down
    views = ball.render(pose)
    assert views.rgb.shape == (1, 3, 20, 24) and views.alpha.max() == 0


def test_saving_and_loading(tmp_path: Path, ball: RadianceField) -> None:
    ball.save(tmp_path / "ball.pt")
    loaded = RadianceField.load(tmp_path / "ball.pt")
    assert loaded.fingerprint() == ball.fingerprint()
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.render(poses(1)).rgb, ball.render(poses(1)).rgb)
    other = RadianceField.load(tmp_path / "ball.pt", image_size=(8, 8))
    assert other.render(poses(1)).rgb.shape == (1, 3, 8, 8) and other.fingerprint() != ball.fingerprint()
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no radiance field"):
        RadianceField.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 1}, "resolution=1 must be at least 2"),
        ({"samples": 0}, "samples=0"),
        ({"low": (0, 0, 1), "high": (1, 1, 1)}, "must lie below"),
        ({"degree": 3}, "degree=3"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"fov_x": 180}, "fov_x"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadianceField(**arguments)  # type: ignore[arg-type]


def test_bad_poses(ball: RadianceField) -> None:
    with pytest.raises(ValueError, match=r"give \(N, 4, 4\)"):
        ball.render(torch.eye(4))
