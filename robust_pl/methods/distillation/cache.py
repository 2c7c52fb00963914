"""A teacher's logits of all training images, asked for once."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from ...data import ImageDataModule
from ...data.loaders import EvalLoader
from ...nets.teacher import Teacher
from ..ranks import sum_over_ranks


def cacheable(name: str, data: LightningDataModule | None) -> None:
    """Refuse a cache where a clean image is not the same in every epoch.

    Raises:
        ValueError: if the data are no ImageDataModule, or augmented.
    """
    if not isinstance(data, ImageDataModule):
        raise ValueError(f"{name}.cache=True looks logits up by a sample's index: pass an ImageDataModule, or set it to False")
    if data.augment:
        raise ValueError(
            f"{name}.cache=True would miss that {type(data).__name__} augments images anew in each epoch: set "
            "data.init_args.augment to false, or cache to false"
        )


def cached_logits(trainer: Trainer, teacher: Teacher, device: torch.device) -> Tensor:
    """Logits (N, K) of all N training images, which processes share out; each row stands at the image's index.

    Costs one forward pass of the teacher for each image.
    """
    data = trainer.datamodule
    images = data.train_images()
    # What may be drawn: of the real training set, all but the validation samples.
    index = data.split[0] if images is data.train_set else torch.arange(len(images))
    loader = EvalLoader(images, index, data.eval_batch_size, trainer.global_rank, trainer.world_size, data.num_workers)
    table = torch.zeros(len(images), data.num_classes, device=device)
    with torch.no_grad():
        for x, _, rows in loader:
            table[rows.to(device)] = teacher(x.to(device)).to(table.dtype)
    return sum_over_ranks(table)
