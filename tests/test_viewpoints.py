"""Camera geometry and ViewSpace against numbers worked out by hand, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from robust_pl.functional.viewpoints import azimuth_and_elevation, camera_to_world, log_tanh_slope
from robust_pl.scenes import ViewSpace, natural_space
from robust_pl.scenes.renderer import focal_length, pixel_rays

S70, C70 = math.sin(math.radians(70)), math.cos(math.radians(70))


@pytest.mark.parametrize(
    ("view", "position"),
    [
        ((0, 0, 0, 4, 0, 0), (0, 0, 4)),
        ((0, 0, 70, 4, 0, 0), (0, -4 * S70, 4 * C70)),
        ((0, 90, 70, 4, 0, 0), (4 * S70, 0, 4 * C70)),
        ((0, 0, -70, 4, 0, 0), (0, 4 * S70, 4 * C70)),
        ((30, 0, 70, 4, 0, 0), (-4 * C70 / 2, -4 * S70, 4 * C70 * math.sqrt(3) / 2)),
        ((0, 0, 0, 3, 0.5, -0.5), (0.5, -0.5, 3)),
        ((0, 0, 90, 5, 0, 0.5), (0, -5, 0.5)),
    ],
)
def test_where_the_camera_stands(view: tuple[float, ...], position: tuple[float, ...]) -> None:
    pose = camera_to_world(torch.tensor(view, dtype=torch.float64))
    torch.testing.assert_close(pose[:3, 3], torch.tensor(position, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(pose[3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64))


def test_the_camera_looks_at_the_origin_with_z_up() -> None:
    generator = torch.Generator().manual_seed(0)
    view = torch.zeros(50, 6, dtype=torch.float64)
    view[:, 1] = 360 * torch.rand(50, generator=generator, dtype=torch.float64) - 180
    view[:, 2] = 1 + 88 * torch.rand(50, generator=generator, dtype=torch.float64)
    view[:, 3] = 4.0
    pose = camera_to_world(view)
    turn, position = pose[:, :3, :3], pose[:, :3, 3]
    identity = torch.eye(3, dtype=torch.float64).expand(50, 3, 3)
    torch.testing.assert_close(turn @ turn.mT, identity)
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(-4 * turn[:, :, 2], -position)  # its own -z points at the origin
    assert (turn[:, 2, 1] > 0).all()  # its own up points upwards
    azimuth, elevation = azimuth_and_elevation(pose)
    torch.testing.assert_close(elevation, 90 - view[:, 2])
    away = (azimuth - (view[:, 1] - 90) + 180) % 360 - 180
    torch.testing.assert_close(away, torch.zeros(50, dtype=torch.float64))


def test_squash_and_its_log_determinant_against_autograd() -> None:
    space = ViewSpace(phi=(10, 80), r=(2, 6))
    u = torch.tensor([0.3, -1.2, 0.0, 2.0, -0.7, 1.0], dtype=torch.float64)
    by_hand = [30 * math.tanh(0.3), 180 * math.tanh(-1.2), 45.0, 4 + 2 * math.tanh(2.0), 0.5 * math.tanh(-0.7)]
    torch.testing.assert_close(space.squash(u)[:5], torch.tensor(by_hand, dtype=torch.float64))
    jacobian = torch.autograd.functional.jacobian(space.squash, u)
    torch.testing.assert_close(space.log_abs_det(u), torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(space.unsquash(space.squash(u)), u)


def test_log_slope_stays_finite_where_tanh_rounds_to_one() -> None:
    torch.testing.assert_close(log_tanh_slope(torch.tensor([40.0])), torch.tensor([math.log(4) - 80.0]))


@pytest.mark.parametrize(
    ("active", "names", "view"),
    [
        ("angles", ("gamma", "theta", "phi"), (0, 0, 0, 4, 0, 0)),
        ("position", ("r", "x", "y"), (0, 0, 45, 4, 0, 0)),
        (["phi", "theta"], ("theta", "phi"), (0, 0, 0, 4, 0, 0)),
    ],
)
def test_only_active_parameters_vary(active: object, names: tuple[str, ...], view: tuple[float, ...]) -> None:
    space = ViewSpace(active=active)  # type: ignore[arg-type]
    assert space.active == names and space.dim == len(names)
    torch.testing.assert_close(space.squash(torch.zeros(space.dim)), torch.tensor(view, dtype=torch.float32))
    drawn = space.uniform(torch.rand(1000, space.dim, generator=torch.Generator().manual_seed(0)))
    assert space.contains(drawn).all()
    moved = (drawn.amax(0) - drawn.amin(0)) > 0
    assert [name for name, m in zip(("gamma", "theta", "phi", "r", "x", "y"), moved.tolist(), strict=True) if m] == list(names)


def test_volume_is_the_entropy_of_the_uniform_distribution() -> None:
    widths = (60, 360, 140, 2, 1, 1)
    assert ViewSpace().log_volume == pytest.approx(sum(math.log(w) for w in widths))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"phi": (70, -70)}, r"phi=\(70, -70\) must rise"),
        ({"r": (0, 5)}, "must lie above 0"),
        ({"normalize_radius": 0.0}, r"normalize_radius=0\.0 must lie above 0"),
        ({"active": "roll"}, "is no viewpoint parameter"),
        ({"active": []}, "choose all, angles, position"),
        ({"active": ["phi", "roll"]}, "roll"),
        ({"active": "angles", "fixed": {"theta": 3.0}}, "theta is both active and fixed"),
    ],
)
def test_bad_spaces(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ViewSpace(**arguments)


def test_a_range_that_enters_the_object_is_refused() -> None:
    ViewSpace().check_outside(2.5)
    with pytest.raises(ValueError, match=r"r begins at 3 and the cow reaches 3\.2"):
        ViewSpace().check_outside(3.2, "the cow")


def test_a_shift_that_loses_the_object_is_refused() -> None:
    """At half a field of view of 45 degrees the side of the picture is where x = r."""
    size = (10, 20)
    ViewSpace(x=(-4.4, 0)).check_in_picture(1.0, 90.0, size)  # 4.4 - 3 is less than the root of 2
    with pytest.raises(ValueError, match=r"x reaches 4\.5 at r=3, from where the cow, which reaches 1 .* narrow ViewSpace\.x"):
        ViewSpace(x=(-4.5, 0)).check_in_picture(1.0, 90.0, size, "the cow")
    ViewSpace(y=(0, 2.6)).check_in_picture(1.0, 90.0, size)  # half as high: 2.6 - 1.5 is less than the root of 1.25
    with pytest.raises(ValueError, match=r"y reaches 2\.7 at r=3"):
        ViewSpace(y=(0, 2.7)).check_in_picture(1.0, 90.0, size)
    with pytest.raises(ValueError, match=r"x reaches 9 at r=4"):
        ViewSpace(active="angles", fixed={"x": -9.0}).check_in_picture(1.0, 90.0, size)
    # Shifts shrink with the distance that published code cancels: 1.5 / sqrt(3^2 + 4.5^2 + 1) of 4.5 - 3 is 0.41.
    ViewSpace(x=(-4.5, 0), normalize_radius=1.5).check_in_picture(1.0, 90.0, size)


def test_a_space_around_cameras() -> None:
    view = torch.tensor([[5.0, theta, phi, r, 0, 0] for theta, phi, r in ((170, 60, 3), (-170, 70, 4), (150, 80, 5))])
    view[:, 0] = 0
    space = ViewSpace.around(camera_to_world(view), margin=5.0)
    assert space.active == ("theta", "phi", "r") and space.fixed == {"gamma": 0.0, "x": 0.0, "y": 0.0}
    assert space.ranges["theta"] == pytest.approx((145, 195), abs=1e-3)  # across 180, not the long way round
    assert space.ranges["phi"] == pytest.approx((55, 85), abs=1e-3) and space.ranges["r"] == pytest.approx((2.997, 5.005))
    same = space.to_matrix(torch.tensor([0.0, 190, 70, 4, 0, 0]))
    torch.testing.assert_close(same, camera_to_world(view)[1], atol=1e-5, rtol=0)
    circle = camera_to_world(torch.tensor([[0.0, theta, 60, 4, 0, 0] for theta in range(-180, 180, 20)]))
    whole = ViewSpace.around(circle, margin=10.0)
    assert whole.ranges["theta"] == pytest.approx((-180, 180)) and whole.ranges["phi"] == pytest.approx((50, 70), abs=1e-3)


def test_the_distance_that_published_code_cancels() -> None:
    space = ViewSpace(normalize_radius=1.5)
    view = torch.tensor([[0.0, 0, 70, r, 0, 0] for r in (3, 4, 5)] + [[20, 30, 40, 3, 0.5, -0.5]], dtype=torch.float64)
    pose, plain = space.to_matrix(view), ViewSpace().to_matrix(view)
    expected = torch.tensor([1.423, 1.455, 1.471, 1.5 * math.sqrt(9.5 / 10.5)], dtype=torch.float64)
    torch.testing.assert_close(pose[:, :3, 3].norm(dim=1), expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(pose[:, :3, :3], plain[:, :3, :3])  # turned as before, in the same direction
    torch.testing.assert_close(torch.linalg.cross(pose[:, :3, 3], plain[:, :3, 3]), torch.zeros(4, 3, dtype=torch.float64))
    assert space.distances == pytest.approx((1.4230, 1.4709), abs=1e-4)
    assert natural_space(space).normalize_radius == 1.5
    space.check_outside(1.4)
    with pytest.raises(ValueError, match=r"normalize_radius=1\.5 puts cameras at 1\.42302 and the cow reaches 1\.45"):
        space.check_outside(1.45, "the cow")


def test_rays_of_pixel_centres_by_hand() -> None:
    pose = camera_to_world(torch.tensor([[0.0, 0, 0, 4, 0, 0]], dtype=torch.float64))
    origins, directions = pixel_rays(pose, (2, 4), 90.0)
    assert focal_length(90.0, 4) == pytest.approx(2.0)
    torch.testing.assert_close(origins, torch.tensor([[0.0, 0, 4]], dtype=torch.float64))
    # Looking down from the pole, right is x and up is y; the first pixel lies at (-1.5, 0.5) / 2.
    expected = torch.tensor([-0.75, 0.25, -1.0], dtype=torch.float64)
    torch.testing.assert_close(directions[0, 0, 0], expected / expected.norm())
    with pytest.raises(ValueError, match="fov_x=180"):
        focal_length(180.0, 4)
