"""Sets of objects: each by its renderer, in any order, in front of one background."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_pl.callbacks.viewpoints.draws import ObjectDraws
from robust_pl.callbacks.viewpoints.problem import ViewProblem
from robust_pl.scenes import Renderer, SceneSet, Views, ViewSpace


class Flat:
    """Fills the left half of every image with one colour, which depends on the camera's distance."""

    fov_x, differentiable, radius = 40.0, True, 0.5

    def __init__(self, colour: float, size: int = 4) -> None:
        self.colour, self.image_size = colour, (size, size)

    def render(self, pose: Tensor) -> Views:
        alpha = torch.zeros(len(pose), 1, *self.image_size)
        alpha[..., : self.image_size[1] // 2] = 1.0
        return Views(self.colour * pose[:, 2, 3].view(-1, 1, 1, 1) * alpha.expand(-1, 3, -1, -1), alpha)

    def fingerprint(self) -> str:
        return f"flat {self.colour}"


def poses(*heights: float) -> Tensor:
    pose = torch.eye(4).repeat(len(heights), 1, 1)
    pose[:, 2, 3] = torch.tensor(heights)
    return pose


def test_every_object_by_its_own_renderer_in_any_order() -> None:
    assert isinstance(Flat(0.1), Renderer)
    scenes = SceneSet([Flat(0.1), Flat(0.2)], [3, 5], background=0.75)
    images = scenes.images(torch.tensor([1, 0, 1]), poses(1, 2, 3))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.2, 0.2, 0.6]))
    assert (images[..., 2:] == 0.75).all()
    assert scenes.labels.tolist() == [3, 5] and scenes.radius == 0.5
    part = scenes.subset([1])
    assert part.ids == ["1"] and part.background == 0.75 and part.labels.tolist() == [5]


def test_a_view_has_the_same_background_wherever_it_is_rendered() -> None:
    bank = torch.linspace(0, 1, 7).view(7, 1, 1, 1).expand(7, 3, 4, 4)
    scenes = SceneSet([Flat(0.1), Flat(0.2)], [0, 1], background=bank)
    key = torch.arange(6)
    which = torch.tensor([0, 1, 0, 1, 0, 1])
    together = scenes.images(which, poses(*[1.0] * 6), key)
    alone = torch.cat([scenes.images(which[i : i + 1], poses(1.0), key[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)
    assert len(together[:, 0, 0, 3].unique()) > 2


def test_an_object_keeps_its_background_in_a_part_of_the_set_and_where_it_is_attacked() -> None:
    bank = torch.linspace(0, 1, 50).view(50, 1, 1, 1).expand(50, 3, 4, 4)
    names = [f"cow {i}" for i in range(6)]
    scenes = SceneSet([Flat(0.1)] * 6, [0] * 6, names, background=bank)
    which = torch.arange(6)
    whole = scenes.images(which, poses(*[4.0] * 6))
    assert len(whole[:, 0, 0, 3].unique()) > 3
    assert torch.equal(scenes.subset([4, 2]).images(which[:2], poses(4.0, 4.0)), whole[[4, 2]])
    space = ViewSpace(active=["gamma"], fixed={"phi": 0.0})
    draws = ObjectDraws(0, names)
    problem = ViewProblem(nn.Linear(1, 1), scenes, scenes.labels, space, draws, 8).part([5, 1])
    seen = problem.images(which[:2], space.squash(torch.zeros(2, 1)))
    assert torch.equal(seen[..., 3], whole[[5, 1]][..., 3])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], []), "at least one object"),
        (([Flat(0.1)], [0, 1]), "1 renderers, 2 labels"),
        (([Flat(0.1), Flat(0.2)], [0, 1], ["cow", "cow"]), "'cow' is there twice"),
        (([Flat(0.1), Flat(0.2, 8)], [0, 1]), "give all one image_size"),
        (([Flat(0.1)], [0], None, 2.0), "background=2.0 is a grey value"),
        (([Flat(0.1)], [0], None, torch.zeros(2, 3, 8, 8)), "do not fit images"),
    ],
)
def test_bad_sets(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SceneSet(*arguments)
