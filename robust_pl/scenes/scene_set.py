"""Objects that can be rendered, with their classes, and what stands behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.hashing import hash_keys, integers, seed_from
from .renderer import Renderer, Views
from .view_space import ViewSpace


class SceneSet:
    """Labelled objects, each with a renderer of its own, all of one image size.

    Args:
        renderers: one for each object.
        labels: class of each object.
        ids: name of each object, unique; default its number.
        background: what is seen around an object: a grey value in [0, 1], 1 is white; or a bank of images (M, 3, H, W), of
            which every view gets one by its key. Without keys it is that of the object's id, whichever objects are beside it:
            attacks, their evaluation folders and :class:`robust_pl.callbacks.ViewSphere` see each object before one picture.

    Raises:
        ValueError: if there is no object, the numbers do not fit, an id occurs twice, or the image sizes differ.
    """

    def __init__(
        self,
        renderers: Sequence[Renderer],
        labels: Sequence[int],
        ids: Sequence[str] | None = None,
        background: float | Tensor = 1.0,
    ) -> None:
        ids = [str(i) for i in range(len(renderers))] if ids is None else list(ids)
        if not renderers:
            raise ValueError("a SceneSet needs at least one object")
        if not len(renderers) == len(labels) == len(ids):
            raise ValueError(f"{len(renderers)} renderers, {len(labels)} labels and {len(ids)} ids: give one of each an object")
        if twice := next((name for i, name in enumerate(ids) if name in ids[:i]), None):
            raise ValueError(f"the object {twice!r} is there twice: give each its own id")
        sizes = {tuple(r.image_size) for r in renderers}
        if len(sizes) > 1:
            raise ValueError(f"objects are rendered at {sorted(sizes)}: give all one image_size")
        self.renderers, self.ids = list(renderers), ids
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.image_size: tuple[int, int] = sizes.pop()
        self.background = background
        self._keys = torch.tensor([seed_from("background", name) for name in ids], dtype=torch.int64)
        if isinstance(background, Tensor) and background.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"backgrounds of shape {tuple(background.shape)} do not fit images of {self.image_size}: give (M, 3, H, W)"
            )
        if not isinstance(background, Tensor) and not 0 <= background <= 1:
            raise ValueError(f"background={background} is a grey value: choose from [0, 1]")

    def __len__(self) -> int:
        return len(self.renderers)

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds every object."""
        return max(renderer.radius for renderer in self.renderers)

    def check_space(self, space: ViewSpace) -> None:
        """Refuse viewpoints inside of an object, and those from which an object is not in the picture.

        Raises:
            ValueError: naming the object.
        """
        for name, renderer in zip(self.ids, self.renderers, strict=True):
            radius, what = renderer.radius, f"the object {name!r}"
            space.check_outside(radius, what)
            space.check_in_picture(radius, renderer.fov_x, self.image_size, what)

    def subset(self, objects: Sequence[int]) -> SceneSet:
        """Some of the objects, with what stands behind them."""
        pick = list(objects)
        return SceneSet(
            [self.renderers[i] for i in pick], self.labels[pick].tolist(), [self.ids[i] for i in pick], self.background
        )

    def views(self, which: Tensor, pose: Tensor) -> Views:
        """Objects ``which`` (N,) from poses (N, 4, 4), without a background; one call of its renderer for each object."""
        height, width = self.image_size
        rgb = torch.zeros(len(which), 3, height, width, device=pose.device)
        alpha = torch.zeros(len(which), 1, height, width, device=pose.device)
        for number in which.unique().tolist():
            rows = (which == number).nonzero().squeeze(1)
            seen = self.renderers[number].render(pose[rows])
            rgb[rows], alpha[rows] = seen.rgb.to(rgb), seen.alpha.to(alpha)
        return Views(rgb, alpha)

    def images(self, which: Tensor, pose: Tensor, key: Tensor | None = None) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] of objects ``which`` (N,) from poses (N, 4, 4), in front of the background.

        Args:
            which: int64.
            pose: camera-to-world.
            key: int64 (N,), chooses from a bank of backgrounds; default one for each object, by its id.
        """
        seen = self.views(which, pose)
        if not isinstance(self.background, Tensor):
            return seen.over(self.background)
        chosen = integers(hash_keys(self._keys[which.cpu()] if key is None else key.cpu()), 0, len(self.background))
        return seen.over(self.background[chosen.to(self.background.device)].to(seen.rgb))
