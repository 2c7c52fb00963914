"""The base of methods that train on rendered views beside the data."""

from __future__ import annotations

import time
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...data.hashing import hash_keys, integers, uniform
from ...nets.normalize import Normalize
from ...scenes.scene_set import SceneSet
from ...scenes.view_space import ViewSpace
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .objects_by_class import ObjectsByClass
from .render_cache import RenderCache

_PICK, _VIEW = 21, 22


class RenderedViews(Method):
    """Cross-entropy on the batch and on ``renders`` views of training objects, rendered for it, as in VIAT's training (Ruan et
    al. 2023, arXiv 2307.10235).

    Of each view the class is uniform among those with objects, the object uniform in its class; a subclass says by
    :meth:`sample_views` from where it is seen. Batch and views are one concatenated batch with one mean loss, and come in the
    same pixels in [0, 1]: for what the authors' code does see ``normalize_renders``. Behind a view is the background of the
    data module's scenes; from a bank of pictures each view gets its own, where an attack shows an object before one picture,
    since an object could else be known by what is behind it. Mixed labels are possible.

    The data module offers ``train_scenes``, a :class:`robust_pl.scenes.SceneSet`, and may offer ``view_space``. Views are
    rendered on the device in :meth:`craft`, without gradients and outside of autocast. Every random number is a function of the
    seed, epoch, batch, process and number of the view: a resumed run sees the same views, and W processes with ``renders`` each
    see those of one process with W * ``renders``.

    Logged at the end of each epoch, of one process: ``train/renders`` of the epoch and ``train/renders_per_second``. On a GPU
    the seconds are those for which the host was busy, which waits for the rasteriser.

    Cost: a step renders ``renders`` views, and takes one forward and one backward pass of the batch and of these.

    Args:
        net: maps pixels in [0, 1], (B, C, H, W), to logits (B, K).
        renders: views beside each batch of a process.
        views_per_object: 0 draws a new viewpoint for every view, so that no pose comes twice. Otherwise each object has so many
            views, drawn once and again where its distribution changes, rendered when first seen and kept on the device as
            8-bit pixels: for renderers that cost more than the network. It takes 3 * H * W bytes a view.
        space: ranges of viewpoints; None takes the ``view_space`` of the data module, or else ViewFool's ranges.
        seed: of all random numbers; None takes that of the data module.
        normalize_renders: False lets renders pass by the network's :class:`robust_pl.nets.Normalize`, as in the authors' code,
            on which the published numbers depend: there the images are normalised, and the renders of the search, but those of
            the training are not.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of range, or the network normalises nothing where ``normalize_renders`` is False;
            before the first step, if the data module offers no ``train_scenes``, their labels or image size do not fit, or a
            camera could stand inside an object or miss it.
    """

    def __init__(
        self,
        net: nn.Module,
        renders: int = 16,
        views_per_object: int = 0,
        space: ViewSpace | None = None,
        seed: int | None = None,
        normalize_renders: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, None, optimizer, schedule, weights, num_classes)
        if renders < 1:
            raise ValueError(f"renders={renders} must be at least 1: use StandardTraining to train without rendered views")
        if views_per_object < 0:
            raise ValueError(f"views_per_object={views_per_object} must be at least 1, or 0 for new views at every step")
        self.renders, self.views_per_object, self.space, self.seed = renders, views_per_object, space, seed
        self.normalize_renders = normalize_renders
        if not normalize_renders and self._normalization() is None:
            raise ValueError(
                "normalize_renders=False, and the network has no Normalize that renders could pass by: give it mean and std, "
                "or leave normalize_renders out"
            )
        self._scenes: SceneSet | None = None
        self._members: ObjectsByClass | None = None
        self._cache: RenderCache | None = None
        self._space, self._seed = ViewSpace() if space is None else space, seed or 0
        self._rendered, self._seconds = 0, 0.0

    @abstractmethod
    def sample_views(self, which: Tensor, keys: Tensor) -> Tensor:
        """Viewpoints (M, 6), from which to see objects.

        Args:
            which: number of the object in ``train_scenes``, int64 (M,) on the CPU.
            keys: int64 (M,) on the CPU, from which all random numbers are drawn, see :mod:`robust_pl.data.hashing`. Equal
                object and key give equal views.
        """

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        example = self.clean(batch)
        x, y = self.rendered_batch()
        if not self.normalize_renders:  # what becomes x again where the network normalises
            x = x * self._normalization().std + self._normalization().mean
        y = y if example.y.dim() == 1 else F.one_hot(y, example.y.shape[1]).to(example.y)
        nowhere = example.index.new_full((len(x),), -1)
        return Example(
            torch.cat([example.x, x.to(example.x.dtype)]), torch.cat([example.y, y]), torch.cat([example.index, nowhere])
        )

    def _normalization(self) -> Normalize | None:
        return next((module for module in self.net.modules() if isinstance(module, Normalize)), None)

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y)

    def rendered_batch(self) -> tuple[Tensor, Tensor]:
        """Pixels (renders, 3, H, W) in [0, 1] and labels of the views that belong to the present batch."""
        began = time.perf_counter()
        number = self.global_rank * self.renders + torch.arange(self.renders)
        keys = hash_keys(self._seed, _PICK, self.current_epoch, self.trainer.fit_loop.batch_idx, number)
        which = self._members.of_class(integers(keys, 0, self._members.classes), uniform(keys, 1))
        if self._cache is None:
            x, rendered = self.render(which, hash_keys(keys, _VIEW)), len(which)
        else:
            view = integers(keys, 2, self.views_per_object)
            of_view = self.view_keys(which, view)
            x, rendered = self._cache.images(which, view, lambda rows: self.render(which[rows], of_view[rows]))
        self._rendered += rendered
        self._seconds += time.perf_counter() - began
        return x, self._scenes.labels[which].to(self.device)

    @torch.no_grad()
    def render(self, which: Tensor, keys: Tensor) -> Tensor:
        """Pixels (M, 3, H, W) in [0, 1] of objects ``which`` as ``keys`` choose viewpoint and background, see above."""
        view = self.sample_views(which, keys).to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # a pose in half precision would be off by degrees
            return self._scenes.images(which, self._space.to_matrix(view.float()), keys)

    def view_keys(self, which: Tensor, view: Tensor) -> Tensor:
        """What ``views_per_object`` views of objects are drawn from, of any shape."""
        return hash_keys(self._seed, _VIEW, which, view)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            data = self.trainer.datamodule
            self._scenes = _scenes_of(data, type(self).__name__, self.num_classes)
            self._space = self.space or getattr(data, "view_space", None) or ViewSpace()
            self._seed = getattr(data, "seed", 0) if self.seed is None else self.seed
            self._members = ObjectsByClass(self._scenes.labels)
            self._scenes.check_space(self._space)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.views_per_object:
            sizes = len(self._scenes), self.views_per_object, self._scenes.image_size
            self._cache = RenderCache(*sizes, self.device)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("train/renders", float(self._rendered))
        self.log("train/renders_per_second", self._rendered / max(self._seconds, 1e-9))
        self._rendered, self._seconds = 0, 0.0


def _scenes_of(data: object, who: str, num_classes: int) -> SceneSet:
    """The objects that a data module trains on.

    Raises:
        ValueError: if it offers none, or none that fit.
    """
    scenes = getattr(data, "train_scenes", None)
    if scenes is None:
        offers = "the run has no data module" if data is None else f"{type(data).__name__} offers no train_scenes"
        raise ValueError(
            f"{offers}, whose objects {who} renders: use a data module with scenes, such as ProceduralViewsDataModule"
        )
    for name, label in zip(scenes.ids, scenes.labels.tolist(), strict=True):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"the object {name!r} has the label {label}: with {num_classes} classes give 0 to {num_classes - 1}"
            )
    shape = getattr(data, "image_shape", None)
    if shape is not None and tuple(shape) != (3, *scenes.image_size):
        raise ValueError(
            f"train_scenes give images {(3, *scenes.image_size)} and the data {tuple(shape)}: give both one image_size"
        )
    return scenes
