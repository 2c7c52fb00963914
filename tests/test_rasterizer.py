"""The rasteriser against closed forms: silhouettes, exact rays, depth order, shading; and that batches change nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import Mesh, MeshRasterizer, Renderer, fragments
from robust_pl.scenes.renderer import focal_length, pixel_rays

FOV = 39.6
SQUARE = torch.tensor([[0, 1, 2], [0, 2, 3]])
LIT = {"ambient": 1.0, "directional": 0.0}


def poses(count: int, seed: int = 0, r: float = 4.0) -> Tensor:
    numbers = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))
    low, high = torch.tensor([[-30.0, -180, -90, r, -0.3, -0.3], [30, 180, 90, r, 0.3, 0.3]])
    return camera_to_world(low + (high - low) * numbers)


def ahead(count: int = 1) -> Tensor:
    """Cameras at the origin that look along -z."""
    return torch.eye(4).repeat(count, 1, 1)


def square(corners: object, **more: Tensor) -> Mesh:
    uv = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    return Mesh(torch.tensor(corners), SQUARE, uv=uv, **more)


def of_trimesh(shape: trimesh.Trimesh, **more: Tensor) -> Mesh:
    return Mesh(torch.from_numpy(np.array(shape.vertices)), torch.from_numpy(np.array(shape.faces)), **more)


SPHERE = of_trimesh(trimesh.creation.icosphere(subdivisions=5))
TORUS = of_trimesh(trimesh.creation.torus(0.6, 0.3), colors=torch.rand(1024, 3, generator=torch.Generator().manual_seed(0)))


def on_plane(pose: Tensor, size: tuple[int, int], point: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along the rays and where they meet a plane, in double precision."""
    origin, direction = pixel_rays(pose.double(), size, FOV)
    origin = origin[:, None, None]
    along = ((point - origin) * normal).sum(-1) / (direction * normal).sum(-1)
    return along, origin + along.unsqueeze(-1) * direction


def test_it_is_a_renderer() -> None:
    renderer = MeshRasterizer(SPHERE, (20, 30))
    assert isinstance(renderer, Renderer) and not renderer.differentiable
    assert renderer.radius == pytest.approx(1.0, abs=1e-6)
    views = renderer.render(poses(3))
    assert views.rgb.shape == (3, 3, 20, 30) and views.alpha.shape == (3, 1, 20, 30)
    assert views.rgb.dtype == views.alpha.dtype == torch.float32 and views.rgb.is_contiguous()


@pytest.mark.parametrize("supersampling", [1, 3])
def test_silhouette_of_a_sphere(supersampling: int) -> None:
    size, r = 96, 3.0
    view = torch.tensor([[20.0, 50, 65, r, 0, 0], [0, -120, -30, r, 0, 0]])
    alpha = MeshRasterizer(SPHERE, (size, size), FOV, supersampling=supersampling).render(camera_to_world(view)).alpha
    radius = focal_length(FOV, size) * math.tan(math.asin(1 / r))
    area = math.pi * radius**2
    torch.testing.assert_close(alpha.sum((1, 2, 3)), torch.full((2,), area), rtol=4e-3, atol=0)
    place = torch.arange(size) + 0.5 - size / 2
    away = (place.square() + place.square().unsqueeze(1)).sqrt()
    assert (alpha[:, :, away < radius - 1] == 1).all() and (alpha[:, :, away > radius + 1] == 0).all()
    inside = (alpha > 0) & (alpha < 1)
    assert inside.any() == (supersampling > 1)


def test_shape_of_a_cube_in_a_wide_image() -> None:
    """Its silhouette spans the projections of its corners, also in an image that is not square."""
    cube = of_trimesh(trimesh.creation.box((1.0, 0.8, 0.6)))
    height, width = 80, 120
    pose = poses(8, seed=2)
    alpha = MeshRasterizer(cube, (height, width), FOV).render(pose).alpha.squeeze(1)
    local = torch.einsum("nji,nvj->nvi", pose[:, :3, :3], cube.vertices - pose[:, None, :3, 3])
    focal = focal_length(FOV, width)
    across, down = (focal * local[..., k] / -local[..., 2] for k in (0, 1))
    for view, x, y in zip(alpha, across + width / 2, height / 2 - down, strict=True):
        rows, columns = (view.amax(k).nonzero() for k in (1, 0))
        found = torch.tensor([columns.min(), columns.max() + 1.0, rows.min(), rows.max() + 1.0])
        torch.testing.assert_close(found, torch.stack([x.min(), x.max(), y.min(), y.max()]), atol=1.0, rtol=0)


def test_coverage_of_triangles_is_exact() -> None:
    """Every pixel centre that a ray from the camera sees through a triangle is covered, and no other."""
    size = (64, 48)
    corners = torch.randn(40, 3, 3, generator=torch.Generator().manual_seed(3))
    pose = poses(1, seed=4)
    origin, direction = (part.double() for part in pixel_rays(pose, size, FOV))
    for triangle in corners:
        alpha = MeshRasterizer(Mesh(triangle, torch.tensor([[0, 1, 2]])), size, FOV).render(pose).alpha[0, 0]
        a, b, c = triangle.double() - origin[0]
        weights = torch.stack([direction[0] @ torch.linalg.cross(p, q) for p, q in ((b, c), (c, a), (a, b))])
        weights = weights * torch.sign(a @ torch.linalg.cross(b, c))
        clear = weights.abs().amin(0) > 1e-6
        assert torch.equal((alpha > 0)[clear], (weights > 0).all(0)[clear])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_nearer_of_two_triangles_is_seen(order: list[int]) -> None:
    """One is nearer on the left, the other on the right: they cross in the plane x = 0."""
    left = [[-1.0, -1, -2], [1, -1, -4], [1, 1, -4], [-1, 1, -2]]
    right = [[-1.0, -1, -4], [1, -1, -2], [1, 1, -2], [-1, 1, -4]]
    red, blue = (torch.tensor([color]).expand(4, 3) for color in ([1.0, 0, 0], [0, 0, 1.0]))
    both = [square(left, colors=red), square(right, colors=blue)]
    rgb = MeshRasterizer(Mesh.joined([both[k] for k in order]), (16, 16), FOV, **LIT).render(ahead()).rgb[0]
    expected = torch.zeros(3, 16, 16)
    expected[0, :, :8] = expected[2, :, 8:] = 1.0
    torch.testing.assert_close(rgb, expected)


def test_texture_is_correct_in_perspective() -> None:
    """A slanted plane whose texture encodes u and v, against the exact intersection of rays and plane."""
    size, ramp = (72, 96), (torch.arange(64) + 0.5) / 64
    picture = torch.stack([ramp.expand(64, 64), ramp.flip(0).unsqueeze(1).expand(64, 64), torch.zeros(64, 64)], -1)
    corners = [[-3.0, -1, -1.5], [3, -1, -1.5], [3, 2, -9], [-3, 2, -9]]
    views = MeshRasterizer(square(corners, textures=[picture]), size, FOV, **LIT).render(ahead())
    a, b, _, d = torch.tensor(corners, dtype=torch.float64)
    _, point = on_plane(ahead(), size, a, torch.linalg.cross(b - a, d - a))
    u, v = (((point[0] - a) @ edge) / (edge @ edge) for edge in (b - a, d - a))
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    assert torch.equal(views.alpha[0, 0] > 0, inside) and inside.sum() > 2000
    middle = (u > 1 / 128) & (u < 127 / 128) & (v > 1 / 128) & (v < 127 / 128)  # texel centres end there
    shown = views.rgb[0, :, middle].double()
    torch.testing.assert_close(shown[0], u[middle], atol=2e-5, rtol=0)
    torch.testing.assert_close(shown[1], v[middle], atol=2e-5, rtol=0)


def test_a_slanted_checkerboard() -> None:
    size = (90, 90)
    board = (torch.arange(8) + torch.arange(8).unsqueeze(1)) % 2
    fine = board.repeat_interleave(32, 0).repeat_interleave(32, 1).float().unsqueeze(-1).expand(-1, -1, 3)
    corners = [[-2.0, -1, -2], [2, -1, -2], [2, 1.5, -8], [-2, 1.5, -8]]
    shown = MeshRasterizer(square(corners, textures=[fine]), size, FOV, **LIT).render(ahead()).rgb[0, 0]
    a, b, _, d = torch.tensor(corners, dtype=torch.float64)
    _, point = on_plane(ahead(), size, a, torch.linalg.cross(b - a, d - a))
    u, v = (8 * ((point[0] - a) @ edge) / (edge @ edge) for edge in (b - a, d - a))
    inside = (u > 0) & (u < 8) & (v > 0) & (v < 8)
    clear = inside & ((u - u.round()).abs() > 0.02) & ((v - v.round()).abs() > 0.02)
    expected = (u.floor() + (7 - v.floor())) % 2  # the first row of the picture is the upper one
    assert clear.sum() > 2000 and torch.equal(shown[clear].double().round(decimals=5), expected[clear])


def test_bilinear_texture_repeats() -> None:
    """Two texels, black and white: uv runs over three periods, and between the texels' centres the value is linear."""
    picture = torch.tensor([[[0.0] * 3, [1.0] * 3]])
    uv = torch.tensor([[-1.0, 0], [2, 0], [2, 1], [-1, 1]])
    corners = torch.tensor([[-1.0, -1, -3], [1, -1, -3], [1, 1, -3], [-1, 1, -3]])
    shown = (
        MeshRasterizer(Mesh(corners, SQUARE, uv=uv, textures=[picture]), (64, 64), 36.0, **LIT).render(ahead()).rgb[0, 0, 32]
    )
    x = 3 * (torch.arange(64) + 0.5 - 32) / focal_length(36.0, 64)
    u = -1 + 3 * (x + 1) / 2
    expected = 1 - (2 * ((u - 0.75) - (u - 0.75).round())).abs()
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)


def test_two_textures_and_a_face_without() -> None:
    """Faces of joined meshes keep their own pictures, of different sizes."""
    red, green = torch.zeros(2, 3, 3), torch.zeros(5, 1, 3)
    red[..., 0], green[..., 1] = 1.0, 0.5
    left, middle, right = ([[x, -1.0, -3], [x + 0.5, -1, -3], [x + 0.5, 1, -3], [x, 1, -3]] for x in (-0.75, -0.25, 0.25))
    blue = torch.tensor([0.0, 0, 0.25]).expand(4, 3)
    mesh = Mesh.joined([square(left, textures=[red]), square(middle, colors=blue), square(right, textures=[green])])
    assert mesh.texture_of_face.tolist() == [0, 0, -1, -1, 1, 1]
    row = MeshRasterizer(mesh, (16, 48), FOV, **LIT).render(ahead()).rgb[0, :, 8].T
    found = {tuple(color) for color in row.round(decimals=5).tolist()} - {(0.0, 0.0, 0.0)}
    assert found == {(1.0, 0.0, 0.0), (0.0, 0.0, 0.25), (0.0, 0.5, 0.0)}


@pytest.mark.parametrize("turn", [False, True])
def test_lambert(turn: bool) -> None:
    """A plane towards +z: colour * (ambient + directional * cos), whatever its winding; from behind it is not lit."""
    color = torch.tensor([[0.8, 0.5, 0.25]])
    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    normals = torch.tensor([[0.0, 0, 1]]).expand(4, 3)
    mesh = Mesh(corners, SQUARE.flip(1) if turn else SQUARE, colors=color.expand(4, 3), normals=normals)
    pose = camera_to_world(torch.tensor([[0.0, 0, 0, 3, 0, 0], [0, 0, 180, 3, 0, 0]]))
    for light in ((0.0, 0, 2), (1.0, 0, 1), (3.0, 0, 4), (1.0, 0, 0)):
        rgb = MeshRasterizer(mesh, (8, 8), FOV, ambient=0.25, directional=0.5, light=light).render(pose).rgb[:, :, 4, 4]
        cosine = light[2] / math.hypot(*light)
        torch.testing.assert_close(rgb, torch.cat([color * (0.25 + 0.5 * cosine), color * 0.25]))


def test_shading_of_a_sphere() -> None:
    """Normals are interpolated: the brightness of a coarse sphere is that of a true one."""
    shape = trimesh.creation.icosphere(subdivisions=3)
    mesh = of_trimesh(shape, normals=torch.from_numpy(np.array(shape.vertices)))
    size, pose, light = (64, 64), poses(2, seed=5), torch.tensor([0.6, 0.0, 0.8])
    rgb = MeshRasterizer(mesh, size, FOV, ambient=0.3, directional=0.7, light=tuple(light.tolist())).render(pose).rgb
    origin, direction = pixel_rays(pose, size, FOV)
    middle = -(direction * origin[:, None, None]).sum(-1)
    half = middle.square() - (origin.square().sum(1)[:, None, None] - 1)
    hit = half > 0.05
    point = origin[:, None, None] + (middle - half.clamp(min=0).sqrt()).unsqueeze(-1) * direction
    expected = 0.3 + 0.7 * (point @ light).clamp(min=0)
    assert (rgb[:, 0][hit] - expected[hit]).abs().max() < 0.02


def test_interpolated_normals_have_length_one() -> None:
    """They turn from 45 degrees to the left to 45 degrees to the right, and face the light in the middle."""
    normals = torch.tensor([[-1.0, 0, 1], [1, 0, 1], [1, 0, 1], [-1, 0, 1]])
    mesh = square([[-1.0, -1, -3], [1, -1, -3], [1, 1, -3], [-1, 1, -3]], normals=normals)
    row = MeshRasterizer(mesh, (5, 65), FOV, ambient=0.0, directional=1.0, light=(0, 0, 1)).render(ahead()).rgb[0, 0, 2]
    x = 3 * (torch.arange(65) - 32) / focal_length(FOV, 65)
    seen = x.abs() < 1
    torch.testing.assert_close(row[seen], 1 / (1 + x[seen].square()).sqrt())


def test_faces_seen_edge_on_stay_behind_what_is_before_them() -> None:
    """Rounding must not bring them forwards, although 1 / z of their plane is not well defined."""
    generator = torch.Generator().manual_seed(12)
    needles = torch.rand(4000, 3, 3, generator=generator) * torch.tensor([1e-6, 2, 2]) - torch.tensor([5e-7, 1, 5])
    behind = Mesh(needles.view(-1, 3), torch.arange(12000).view(-1, 3), colors=torch.zeros(12000, 3))
    front = square([[-2.0, -2, -2.9], [2, -2, -2.9], [2, 2, -2.9], [-2, 2, -2.9]])
    renderer = MeshRasterizer(Mesh.joined([front, behind]), (65, 65), FOV, **LIT)
    assert MeshRasterizer(behind, (65, 65)).render(ahead()).alpha.sum() > 50
    assert (renderer.render(ahead()).rgb > 0.999).all()


def test_a_plane_through_the_camera() -> None:
    """The floor begins behind the camera: seen up to the horizon, and exactly in perspective; nothing is mirrored above."""
    corners = [[-50.0, -1, 50], [50, -1, 50], [50, -1, -50], [-50, -1, -50]]
    size = (65, 64)
    colors = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    views = MeshRasterizer(square(corners, colors=colors), size, FOV, **LIT).render(ahead())
    along, point = on_plane(ahead(), size, torch.tensor([0.0, -1, 0]).double(), torch.tensor([0.0, 1, 0]).double())
    seen = (along[0] > 0) & (point[0, ..., 2] > -50)
    assert torch.equal(views.alpha[0, 0] > 0, seen) and seen[33:].any() and not seen[:33].any()
    torch.testing.assert_close(views.rgb[0, 0][seen].double(), (point[0, ..., 0][seen] + 50) / 100, atol=1e-5, rtol=0)


def test_what_is_behind_or_too_near_is_not_seen() -> None:
    behind = square([[-1.0, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]])
    touching = square([[-1.0, -1, -5e-4], [1, -1, -5e-4], [1, 1, -5e-4], [-1, 1, -5e-4]])
    for mesh in (behind, touching):
        assert MeshRasterizer(mesh, (8, 8)).render(ahead()).alpha.sum() == 0
    floor = square([[-1.0, -2e-4, 1], [1, -2e-4, 1], [1, -2e-4, -1], [-1, -2e-4, -1]])
    alpha = MeshRasterizer(floor, (64, 64), FOV).render(ahead()).alpha[0, 0, :, 32]
    depth = 2e-4 * focal_length(FOV, 64) / (torch.arange(64) + 0.5 - 32)
    assert torch.equal(alpha > 0, (depth > 1e-3) & (depth < 1)) and (0 < alpha.sum() < 32)


def test_the_inside_of_a_closed_mesh() -> None:
    """From inside, the backs of its faces are seen: they are only left out where the camera stands outside."""
    box = of_trimesh(trimesh.creation.box((2.0, 2, 2)))
    assert box.closed
    views = MeshRasterizer(box, (16, 16), 90.0, **LIT).render(poses(4, r=0.2))
    assert (views.alpha == 1).all() and (views.rgb > 0.999999).all()


def test_no_cracks_between_faces() -> None:
    """A square cut into random triangles, needles among them, covers its image."""
    from scipy.spatial import Delaunay

    points = 2 * torch.rand(3000, 2, generator=torch.Generator().manual_seed(6)) - 1
    points[:1000, 0] *= 1e-3
    points = torch.cat([points, torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])])
    faces = torch.from_numpy(Delaunay(points.numpy()).simplices)
    mesh = Mesh(torch.cat([points, torch.zeros(len(points), 1)], 1), faces)
    view = torch.tensor([[0.0, 0, 0, 1.5, 0, 0], [0, 45, 20, 1, 0.1, 0], [7, 13, 0, 1.2, 0.01, 0.02]])
    for size in (63, 64, 150):
        assert (MeshRasterizer(mesh, (size, size), FOV).render(camera_to_world(view)).alpha == 1).all()


def test_the_front_of_a_closed_mesh_hides_its_back() -> None:
    culled, whole = MeshRasterizer(TORUS, (64, 64)), MeshRasterizer(TORUS, (64, 64))
    assert TORUS.closed
    whole._scene = whole._scene._replace(closed=False)
    pose = poses(6, seed=7)
    for a, b in zip(culled.render(pose), whole.render(pose), strict=True):
        assert (a != b).sum() <= 3  # pixels on an edge of the silhouette


@pytest.mark.parametrize("supersampling", [1, 2])
def test_a_batch_is_its_single_views_bit_for_bit(supersampling: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(8))
    mesh = Mesh(TORUS.vertices, TORUS.faces, colors=TORUS.colors, uv=TORUS.vertices[:, :2], textures=[picture])
    renderer = MeshRasterizer(mesh, (40, 56), supersampling=supersampling)
    pose = poses(7, seed=9)
    together = renderer.render(pose)
    for k in range(7):
        for one, all_ in zip(renderer.render(pose[k : k + 1]), together, strict=True):
            assert torch.equal(one[0], all_[k])
    monkeypatch.setattr(fragments, "FRAGMENTS", 1000)
    for small, large in zip(renderer.render(pose), together, strict=True):
        assert torch.equal(small, large)


def test_supersampling_is_the_mean_of_a_larger_image() -> None:
    pose = poses(2, seed=10)
    large = MeshRasterizer(TORUS, (96, 96)).render(pose)
    small = MeshRasterizer(TORUS, (32, 32), supersampling=3).render(pose)
    for one, many in zip(small, large, strict=True):
        torch.testing.assert_close(one, torch.nn.functional.avg_pool2d(many, 3), atol=1e-6, rtol=0)
    assert small.alpha.min() >= 0 and small.alpha.max() <= 1 and (small.rgb <= small.alpha + 1e-6).all()


def test_poses_without_a_place_see_nothing() -> None:
    pose = poses(5)
    pose[1, 0, 3], pose[2, :, 3] = math.nan, math.inf
    pose[3, :3, :3] = math.nan
    pose[4, :3, 3] = 1e30
    views = MeshRasterizer(TORUS, (16, 16)).render(pose)
    assert views.alpha[0].any() and not views.alpha[1:].any() and views.rgb.isfinite().all()


def test_no_poses_and_other_dtypes() -> None:
    renderer = MeshRasterizer(TORUS, (16, 16))
    assert renderer.render(torch.zeros(0, 4, 4)).rgb.shape == (0, 3, 16, 16)
    assert torch.equal(renderer.render(poses(2).double()).rgb, renderer.render(poses(2)).rgb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same() -> None:
    pose = poses(5, seed=11)
    there = MeshRasterizer(TORUS, (64, 64)).render(pose.cuda())
    here = MeshRasterizer(TORUS, (64, 64)).render(pose)
    for a, b in zip(there, here, strict=True):
        assert a.is_cuda and ((a.cpu() - b).abs() > 1e-3).float().mean() < 1e-3


def test_fingerprint_knows_the_mesh_and_every_argument() -> None:
    base: dict[str, object] = {"image_size": (16, 16), "fov_x": FOV}
    changes = [
        {},
        {"image_size": (16, 17)},
        {"fov_x": 40.0},
        {"supersampling": 2},
        {"ambient": 0.4},
        {"directional": 0.6},
        {"light": (0.0, 0.0, 1.0)},
    ]
    found = [MeshRasterizer(TORUS, **{**base, **change}).fingerprint() for change in changes]  # type: ignore[arg-type]
    found.append(MeshRasterizer(TORUS.fitted(0.5), **base).fingerprint())  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    assert found[0] == MeshRasterizer(TORUS, **base).fingerprint()  # type: ignore[arg-type]
    assert all(a != b for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": (0, 8)}, "image_size="),
        ({"fov_x": 180.0}, "fov_x="),
        ({"supersampling": 0}, "supersampling="),
        ({"ambient": -0.1}, "ambient="),
        ({"directional": -1.0}, "directional="),
        ({"light": (0, 0, 0)}, "light="),
    ],
)
def test_wrong_arguments(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeshRasterizer(TORUS, **change)  # type: ignore[arg-type]


def test_wrong_poses() -> None:
    with pytest.raises(ValueError, match="pose has the shape"):
        MeshRasterizer(TORUS).render(torch.eye(4))
