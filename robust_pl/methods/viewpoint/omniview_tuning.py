"""Tuning of CLIP-like models for viewpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ...callbacks.attacks.checks import choose
from ...callbacks.attacks.prepare import evaluating
from ...data import ImageDataModule
from ...data.loaders import EvalLoader
from ...data.view_table import ViewTable
from ...functional.contrastive import ANCHOR_WEIGHTS, AnchorWeights, anchors, hard_views, viewpoint_alignment
from ...nets.clip_pair import ImageTextPair
from ..base import OptimizerFactory
from ..late_buffers import LateBuffers
from ..ranks import sum_over_ranks
from ..schedules import Schedule
from .contrastive import CaptionedExample, ContrastiveTraining


@dataclass
class ViewExample(CaptionedExample):
    """A batch with its captions and where its objects usually are.

    Args:
        anchor: of the object in each image, (B, d).
        hard: whether the image is one of the views that stray from it, bool (B,).
    """

    anchor: Tensor | None = None
    hard: Tensor | None = None


class OmniviewTuning(ContrastiveTraining):
    """Omniview-Tuning (Ruan et al. 2024, arXiv 2404.12139): a zero-shot classifier that no longer minds viewpoints.

    ``image-text contrastive + lmbda * mean over hard views of max(1 - cos(z, anchor) + margin, 0)``. At the start of each epoch
    all training images are embedded; the anchor of an object is a weighted mean of its views, and its hard views are those
    ``hard_views`` with the lowest cosine to it. Both are constants for the epoch and get no gradient; see
    :mod:`robust_pl.functional.contrastive` for the formulas, and that the hinge never clips. A batch without a hard view has no
    second term. On several processes each takes the mean over its own hard views.

    The text encoder is frozen. Give ``net`` low-rank weights and a :class:`VIFormer` as the authors do, or neither, which tunes
    the whole image encoder. An object with one image is never hard, so general images may be mixed in as objects of their own
    to keep what the model knew: the authors take 256 of ImageNet beside 512 views. They clip gradients at norm 1
    (``trainer.gradient_clip_val``), anneal by epoch, and train on images turned by up to 90 degrees.

    The data module has ``train_metadata``, a :class:`robust_pl.data.ViewTable`, as :class:`MultiViewDataModule` does. Anchors
    and hard views are in the checkpoint: 4 d bytes an object and 1 an image. Logged for each epoch's start:
    ``train/view_cosine`` and ``train/hard_view_cosine``, mean cosine to the anchor of all images and of the hard ones.

    Args:
        net: see :class:`ContrastiveTraining`, and so all others that are not named here.
        lmbda: weight of the alignment; 0 leaves it and the embedding of the training images out.
        hard_views: K views of each object.
        margin: m, a constant in the loss.
        anchor_weights: ``isolated`` as the authors' code, or ``mean``.

    Raises:
        ValueError: if an argument is out of range; before the first step, if the data do not say which object is in an image.

    Cost: a step is that of :class:`ContrastiveTraining`; an epoch starts with one forward pass of the image encoder over the
    training set, shared out over processes, and holds 4 d bytes an image on each device.
    """

    def __init__(
        self,
        net: ImageTextPair,
        lmbda: float = 1.0,
        hard_views: int = 5,
        margin: float = 0.3,
        anchor_weights: AnchorWeights = "isolated",
        caption: str = "a picture of a {}",
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, caption, optimizer, schedule, weights, num_classes)
        for name, value in (("lmbda", lmbda), ("margin", margin)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if hard_views < 1:
            raise ValueError(f"hard_views={hard_views} must be at least 1: lmbda=0 trains on captions alone")
        choose("anchor_weights", anchor_weights, ANCHOR_WEIGHTS)
        net.freeze_text()
        self.lmbda, self.hard_views, self.margin, self.anchor_weights = lmbda, hard_views, margin, anchor_weights
        self.views = LateBuffers("anchors", "hard", "epoch")
        self.views.begin(hard=torch.zeros(0, dtype=torch.bool), epoch=torch.zeros(0, dtype=torch.int64))
        self._object: Tensor | None = None

    def clean(self, batch: tuple[Tensor, ...]) -> CaptionedExample:
        example = super().clean(batch)
        if not self.lmbda:
            return example
        anchor, hard = self.views.anchors[self._object[example.index]], self.views.hard[example.index]
        return ViewExample(**vars(example), anchor=anchor, hard=hard)

    def loss(self, example: CaptionedExample) -> Tensor:
        image = self.net.encode_image(example.x)
        loss = self.contrast(image, example)
        if not isinstance(example, ViewExample):
            return loss
        return loss + self.lmbda * viewpoint_alignment(image, example.anchor, example.hard, self.margin)

    def find_hard_views(self) -> None:
        """Embed the training images with the present weights, and keep anchors and hard views for the epoch."""
        index = self.trainer.datamodule.split[0].to(self.device)
        objects = self._object[index]
        count = len(self.trainer.datamodule.train_metadata.object_ids)
        z = self._embedded(index)
        anchor = anchors(z, objects, count, self.anchor_weights)
        chosen = hard_views(z, objects, anchor, self.hard_views)
        hard = torch.zeros(len(self._object), dtype=torch.bool, device=self.device)
        hard[index] = chosen
        self.views.begin(anchors=anchor, hard=hard, epoch=torch.tensor(self.current_epoch, device=self.device))
        cosine = torch.nn.functional.cosine_similarity(z, anchor[objects], dim=1)
        self.log("train/view_cosine", cosine.mean())
        self.log("train/hard_view_cosine", (cosine * chosen).sum() / chosen.sum().clamp_min(1))

    @torch.no_grad()
    def _embedded(self, index: Tensor) -> Tensor:
        """Normalised embeddings (N, d) of training images, without augmentation."""
        data, trainer = self.trainer.datamodule, self.trainer
        place = torch.full((len(self._object),), -1, device=self.device)
        place[index] = torch.arange(len(index), device=self.device)
        own = trainer.global_rank, trainer.world_size
        z = torch.zeros(len(index), self._dim(), device=self.device)
        with evaluating(self.net), trainer.precision_plugin.val_step_context():
            for x, _, i in EvalLoader(data.train_set, data.split[0], data.eval_batch_size, *own, data.num_workers):
                z[place[i.to(self.device)]] = self.net.encode_image(x.to(self.device)).float()
        return sum_over_ranks(z)

    def _dim(self) -> int:
        return self.net.encode_text(self._tokens[:1]).shape[1]

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.lmbda:
            return
        data = self.trainer.datamodule
        table = getattr(data, "train_metadata", None)
        if not isinstance(data, ImageDataModule) or not isinstance(table, ViewTable) or len(table) != len(data.train_images()):
            raise ValueError(
                "OmniviewTuning must know which object is in each training image, which the data do not say: use "
                "MultiViewDataModule or ProceduralViewsDataModule, or set lmbda to 0"
            )
        self._object = table.object.to(self.device)

    def on_train_epoch_start(self) -> None:
        # A run that resumes within an epoch goes on with what that began with.
        if self.lmbda and (self.views.empty or int(self.views.epoch) != self.current_epoch):
            self.find_hard_views()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.views.make_room(checkpoint["state_dict"], "views")
        super().on_load_checkpoint(checkpoint)
