"""The base of methods whose loss compares images with augmented versions of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...data.augmentations import Augmentation
from ...data.hashing import VERSIONS, hash_keys
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class AugmentedTraining(Method):
    """Each image together with ``versions`` augmented versions of itself, in one batch and one forward pass.

    The example holds them one after the other: all images, then the first version of all, and so on; so do labels and indices.
    A training attack, where there is one, attacks all of them. The versions are made in float32 without a graph, once a step,
    and are functions of ``seed``, the epoch and the sample's index; for a loader without indices of the batch's and the
    sample's place instead. Where pixels are attacked, values that an augmentation moved out of [0, 1] are cut off first.

    Args:
        net: see :class:`Method`, and so all others.
        attack: of the images and their versions; None attacks nothing.
        augmentation: makes a version; None takes the method's own.
        seed: of the versions; None takes that of the data module.

    Raises:
        ValueError: if the augmentation mixes labels.
        TypeError: if it is none.
    """

    versions: int = 1
    """How many augmented versions of an image the loss sees."""

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        augmentation: Augmentation | None = None,
        seed: int | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        self.augmentation = self.default_augmentation() if augmentation is None else augmentation
        self.seed = seed
        if not isinstance(self.augmentation, Augmentation):
            raise TypeError(f"augmentation={augmentation!r} is no augmentation: take one such as PRIME")
        if self.augmentation.mixes_labels:
            raise ValueError(
                f"augmentation={type(self.augmentation).__name__} mixes labels, and an image and its versions have one label: "
                "put it into the data's list augment"
            )

    @staticmethod
    def default_augmentation() -> Augmentation:
        """What makes a version where nothing is given."""
        raise NotImplementedError("a subclass defines default_augmentation()")

    def clean(self, batch: tuple[Tensor, ...]) -> Example:
        example = super().clean(batch)
        x, y = example.x, example.y
        keys = version_keys(self, self.seed, batch)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            made = [self.augmentation(x, y, hash_keys(keys, i))[0] for i in range(self.versions)]
        everything = torch.cat([x, *made])
        if self.attack is not None:
            everything = everything.clamp(0, 1)
        times = 1 + self.versions
        y = y.repeat(times, *[1] * (y.dim() - 1))
        return replace(example, x=everything, y=y, index=example.index.repeat(times))

    def logits(self, example: Example) -> tuple[Tensor, ...]:
        """Those of the images and of each version, (B, K) each; of attacked ones where there is an attack."""
        return self(example.x if example.x_adv is None else example.x_adv).chunk(1 + self.versions)

    def labels(self, example: Example) -> Tensor:
        """The labels (B,), or (B, K), of the images, and of each version alike."""
        return example.y[: len(example.y) // (1 + self.versions)]


def version_keys(method: Method, seed: int | None, batch: tuple[Tensor, ...]) -> Tensor:
    """What the samples draw their versions by, int64 (B,): the epoch and their index, else their batch, process and place."""
    if seed is None:
        seed = 0 if method._trainer is None else getattr(method.trainer.datamodule, "seed", 0)
    if len(batch) > 2:
        return hash_keys(seed, VERSIONS, method.current_epoch, batch[2])
    place = torch.arange(len(batch[0]), device=batch[0].device)
    return hash_keys(seed, VERSIONS, method.current_epoch, method.trainer.fit_loop.batch_idx, method.global_rank, place)
