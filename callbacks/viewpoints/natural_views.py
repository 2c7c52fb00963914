"""Viewpoints as photographers choose them."""

from __future__ import annotations

import torch

from ...scenes.natural import USUAL_ELEVATION, natural_space
from ...scenes.view_space import Range, ViewSpace
from .base import ViewpointAttack
from .distribution import UniformViews
from .problem import ViewProblem
from .random_views import refuse_start
from .search import Order, Searched


class NaturalViews(ViewpointAttack):
    """Upright views from all around at usual elevations: the natural views of VIAT (Ruan et al. 2023, arXiv 2307.10235).

    Tilt ``gamma`` is 0, azimuth ``theta`` uniform, ``phi`` is 90 degrees minus an elevation uniform in its range; distance and
    shifts are uniform in the ranges of the space, as far as they are active there. The authors take an elevation range for each
    class, which their release leaves out; here it is one for all. Accuracy under it is the clean accuracy that attacks start
    from, with the same renderer and background.

    Cost: ``eval_samples`` renders and forward passes for each object.

    Args:
        elevation: lowest and highest, in degrees above the horizon.
        space: see :class:`ViewpointAttack`, and so all others.
    """

    def __init__(
        self,
        elevation: Range = USUAL_ELEVATION,
        *,
        space: ViewSpace | None = None,
        eval_samples: int = 100,
        batch_size: int = 256,
        chunk: int = 16,
        seed: int = 0,
        name: str | None = None,
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        super().__init__(
            space=space,
            eval_samples=eval_samples,
            batch_size=batch_size,
            chunk=chunk,
            seed=seed,
            name=name,
            every_n_epochs=every_n_epochs,
            folder=folder,
        )
        natural_space(ViewSpace(), elevation)  # refuses elevations that are none
        self.elevation = (elevation[0], elevation[1])

    def space_of(self, space: ViewSpace) -> ViewSpace:
        return natural_space(space, self.elevation)

    def search(self, problem: ViewProblem, order: Order) -> Searched:
        refuse_start(self, order)
        return Searched(UniformViews(problem.space, problem.ids), torch.zeros(len(problem.ids), 0, 2))
