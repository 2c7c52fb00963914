"""The renderers behind extras, where they are installed: the same protocol, and nearly the pictures of the rasteriser."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes import Mesh, MeshRasterizer, MitsubaRenderer, PyrenderRenderer, Renderer, make_solid
from robust_pl.scenes.renderer import focal_length

CLASSES = {"mitsuba": MitsubaRenderer, "pyrender": PyrenderRenderer}
FOV = 39.6


@pytest.fixture(params=CLASSES)
def renderer_class(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param)
    found = CLASSES[request.param]
    try:
        found(make_solid("box", 0), (8, 8))
    except OSError as error:
        pytest.skip(str(error))
    return found


def sphere() -> Mesh:
    shape = trimesh.creation.icosphere(subdivisions=4)
    return Mesh(torch.from_numpy(np.array(shape.vertices)), torch.from_numpy(np.array(shape.faces)))


def poses() -> Tensor:
    return camera_to_world(torch.tensor([[20.0, 50, 65, 3, 0, 0], [0, -120, -30, 3, 0, 0]]))


def test_silhouette_of_a_sphere(renderer_class: Any) -> None:
    size, r = 96, 3.0
    renderer = renderer_class(sphere(), (size, size), FOV)
    assert isinstance(renderer, Renderer) and not renderer.differentiable and renderer.radius == pytest.approx(1.0)
    views = renderer.render(poses())
    assert views.rgb.shape == (2, 3, size, size) and views.alpha.shape == (2, 1, size, size)
    radius = focal_length(FOV, size) * math.tan(math.asin(1 / r))
    torch.testing.assert_close(views.alpha.sum((1, 2, 3)), torch.full((2,), math.pi * radius**2), rtol=1e-2, atol=0)
    place = torch.arange(size) + 0.5 - size / 2
    away = (place.square() + place.square().unsqueeze(1)).sqrt()
    assert (views.alpha[:, :, away < radius - 1] > 0.999).all() and (views.alpha[:, :, away > radius + 1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mug", "letter"])
def test_the_same_picture_as_the_rasterizer(renderer_class: Any, kind: str) -> None:
    """Lit from everywhere alike: place, texture and orientation agree, in a wide image from a tilted camera."""
    mesh = make_solid(kind, 4)
    pose = camera_to_world(torch.tensor([[15.0, 30, 60, 4, 0.3, -0.2], [0, 200, 80, 3, 0, 0.1]]))
    lit = {"ambient": 1.0, "directional": 0.0}
    ours = MeshRasterizer(mesh, (48, 72), FOV, supersampling=4, **lit).render(pose)
    theirs = renderer_class(mesh, (48, 72), FOV, **lit).render(pose)
    assert (ours.alpha - theirs.alpha).abs().mean() < 0.01
    covered = ours.alpha.expand_as(ours.rgb) == 1
    if renderer_class is PyrenderRenderer:
        assert (ours.rgb - theirs.rgb)[covered].abs().mean() < 0.03
    else:  # a sky is hidden where surfaces face each other
        assert np.corrcoef(ours.rgb[covered], theirs.rgb[covered])[0, 1] > 0.75
    flipped = np.corrcoef(ours.rgb.flip(-1).flatten(), theirs.rgb.flatten())[0, 1]
    assert np.corrcoef(ours.rgb.flatten(), theirs.rgb.flatten())[0, 1] > max(0.9, flipped + 0.05)


@pytest.mark.slow
def test_the_sun_shines_from_where_it_is(renderer_class: Any) -> None:
    light = (0.6, 0.0, 0.8)
    ours, theirs = (
        found(sphere(), (48, 48), FOV, ambient=0.0, directional=1.0, light=light).render(poses()).rgb
        for found in (MeshRasterizer, renderer_class)
    )
    if renderer_class is PyrenderRenderer:  # linear light
        ours = ours ** (1 / 2.2)
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.98


@pytest.mark.slow
def test_the_same_poses_give_the_same_images(renderer_class: Any) -> None:
    renderer = renderer_class(make_solid("torus", 1), (32, 32), FOV)
    first, alone = renderer.render(poses()), renderer.render(poses()[1:])
    assert torch.equal(first.rgb, renderer.render(poses()).rgb) and torch.equal(first.rgb[1], alone.rgb[0])
    again = renderer_class(make_solid("torus", 1), (32, 32), FOV)
    assert again.fingerprint() == renderer.fingerprint()
    assert renderer_class(make_solid("torus", 1), (32, 32), FOV, ambient=0.4).fingerprint() != renderer.fingerprint()


@pytest.mark.parametrize("name", CLASSES)
def test_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'robust_pl\[{name}\]'"):
        CLASSES[name](make_solid("box", 0))


def test_wrong_numbers_of_samples() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        MitsubaRenderer(make_solid("box", 0), samples=0)
