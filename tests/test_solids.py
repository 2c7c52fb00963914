"""The procedural solids: deterministic, upright, closed, alike in paint, and alike from some sides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import Mesh, MeshRasterizer, make_solid
from robust_pl.scenes.paint import Numbers, random_picture
from robust_pl.scenes.solids import SOLIDS


def alpha(mesh: Mesh, *view: float) -> Tensor:
    """From far away, so that perspective hardly matters."""
    pose = camera_to_world(torch.tensor([view]))
    return MeshRasterizer(mesh, (64, 64), 3.6).render(pose).alpha[0, 0]


@pytest.mark.parametrize("kind", SOLIDS)
def test_every_solid_is_a_valid_mesh(kind: str) -> None:
    for seed in (0, -7, 2**40):
        mesh = make_solid(kind, seed)
        assert mesh.closed and len(mesh.faces) < 2500 and len(mesh.textures) == 1
        assert mesh.radius == pytest.approx(1.0, abs=1e-6)
        torch.testing.assert_close(mesh.vertices.amax(0), -mesh.vertices.amin(0), atol=1e-5, rtol=0)
        corners = mesh.vertices[mesh.faces]
        normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (normal.norm(dim=1) > 1e-8).all()
        assert ((mesh.normals * normal.unsqueeze(1)).sum(-1) > 0).all()


@pytest.mark.parametrize("kind", SOLIDS)
def test_a_solid_is_a_function_of_its_class_and_seed(kind: str) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = make_solid(kind, 5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert make_solid(SOLIDS.index(kind), 5).fingerprint() == first.fingerprint()
    others = [make_solid(kind, seed) for seed in range(6, 9)]
    assert all(other.fingerprint() != first.fingerprint() for other in others)
    assert len({tuple(other.vertices.amax(0).tolist()) for other in others}) == 3


def test_paint_does_not_give_the_class_away() -> None:
    for seed in range(3):
        pictures = [make_solid(kind, seed).textures[0] for kind in SOLIDS]
        assert all(torch.equal(pictures[0], picture) for picture in pictures)
        assert all((make_solid(kind, seed).colors == 1).all() for kind in SOLIDS)


def test_pictures_are_of_many_kinds_and_can_be_repeated() -> None:
    pictures = torch.stack([random_picture(Numbers(seed)) for seed in range(60)])
    assert pictures.shape == (60, 64, 64, 3) and pictures.min() >= 0 and pictures.max() <= 1
    colors = [len(picture.reshape(-1, 3).unique(dim=0)) for picture in pictures]
    assert min(colors) == 1 and colors.count(2) > 20 and max(colors) > 1000
    noise = pictures[[count > 100 for count in colors]]
    inside, across = (noise[:, 1:] - noise[:, :-1]).abs().amax(), (noise[:, 0] - noise[:, -1]).abs().amax()
    assert across <= 1.5 * inside  # no seam
    mean = pictures.mean((1, 2))
    assert (mean.amax(0) - mean.amin(0) > 0.5).all()


def test_they_stand_upright() -> None:
    """Seen from the front, a cone is wide at its foot, a chair has its back and a table its top at the upper end."""
    cone, table = (alpha(make_solid(kind, 1), 0, 0, 90, 40, 0, 0).sum(1) for kind in ("cone", "table"))
    rows = cone.nonzero().squeeze(1)
    quarter = len(rows) // 4
    assert cone[rows[3 * quarter]] == pytest.approx(3 * cone[rows[quarter]].item(), rel=0.2)
    rows = table.nonzero().squeeze(1)
    assert table[rows[0]] > 2 * table[rows].median()
    chair = make_solid("chair", 1)
    high = chair.vertices[chair.vertices[:, 2] > 0.5 * chair.vertices[:, 2].max()]
    assert (high[:, 1] > 0).all()  # the front is at -y


@pytest.mark.parametrize(
    ("kind", "above", "aside"),
    [
        ("cylinder", math.pi / 4, 1.0),
        ("cone", math.pi / 4, 0.5),
        ("capsule", math.pi / 4, 0.9),
        ("box", 1.0, 1.0),
        ("table", 1.0, 0.25),
        ("letter", 1.0, 0.5),
    ],
)
def test_classes_look_alike_from_above_but_not_from_the_side(kind: str, above: float, aside: float) -> None:
    """How much of its bounding rectangle a silhouette fills: three are discs from above, and three are rectangles."""
    for mesh in (make_solid(kind, seed) for seed in (4, 6)):
        for share, phi in ((above, 0), (aside, 90)):
            seen = alpha(mesh, 0, 0, phi, 40, 0, 0)
            area = seen.amax(0).sum() * seen.amax(1).sum()
            assert float(seen.sum() / area) == pytest.approx(share, abs=0.2 if share == 0.5 else 0.08)


@pytest.mark.parametrize("kind", ["sphere", -1, 10])
def test_unknown_classes(kind: str | int) -> None:
    with pytest.raises(ValueError, match="is no solid: choose from"):
        make_solid(kind, 0)


def test_every_class_has_a_shape() -> None:
    from robust_pl.scenes.solid_shapes import SHAPES

    assert tuple(SHAPES) == SOLIDS
