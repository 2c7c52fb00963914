"""Augmentations of whole batches on the training device: the base, and those that change pixels alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from .augment import shift
from .hashing import AUGMENT, hash_keys, uniform


class Augmentation(ABC):
    """A change of training batches, for the argument ``augment`` of a data module: one class, one method.

    It draws all random numbers from the samples' keys, ``hashing.uniform(keys, draw)``, so that they depend on the seed, the
    epoch and the sample alone: not on the batch that the sample is in, the rank, or where a run was resumed.
    """

    mixes_labels: bool = False
    """Whether it needs labels of the form (B, K); it is then given them, float, at least float32."""
    in_blocks: bool = False
    """Whether many batches may be changed at once, ahead of their steps, which saves a GPU the start of many small kernels: it
    only moves or replaces pixels, by each sample's key alone."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Changed images and labels; the given ones stay as they are.

        Args:
            x: pixels (B, C, H, W) in [0, 1].
            y: labels int64 (B,), or float (B, K) if mixed.
            keys: int64 (B,), on the device of ``x``.
        """


def augmented(
    batch: tuple[Tensor, Tensor, Tensor],
    augmentations: Sequence[Augmentation],
    num_classes: int,
    seed: int,
    epoch: int,
    which: slice = slice(None),
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch (x, y, index) after ``which`` of the augmentations, one after the other; each draws numbers of its own."""
    x, y, index = batch
    places = range(len(augmentations))[which]
    keys = hash_keys(seed, AUGMENT, epoch, index) if places else index
    for place in places:
        augmentation = augmentations[place]
        if augmentation.mixes_labels and not y.is_floating_point():
            rows = torch.zeros(len(y), num_classes, dtype=torch.promote_types(x.dtype, torch.float32), device=y.device)
            y = rows.scatter_(1, y.unsqueeze(1), 1.0)
        x, y = augmentation(x, y, hash_keys(keys, place))
    return x, y, index


def partners(keys: Tensor, draw: int) -> Tensor:
    """For each sample another one of the batch, int64 (B,): the next in an order drawn from the keys.

    No two have the same, and a sample has itself only if it is alone. Another batch gives other partners.
    """
    order = uniform(keys, draw).argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off, for matrix products on the device of ``x`` that pixels depend on; the meta device knows no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def box(keys: Tensor, draw: int, size: tuple[int, int], height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, H) and columns (B, W), bool, of a box around a uniformly drawn pixel, cut off at the image's edges.

    Args:
        keys: int64 (B,).
        draw: number of the first of two draws.
        size: (H, W) of the image.
        height: of the box, a number or int64 (B,).
        width: of the box, likewise.
    """
    sides = []
    draws = uniform(keys, torch.arange(draw, draw + 2, device=keys.device).unsqueeze(1))
    for drawn, length, extent in zip(draws, size, (height, width), strict=True):
        first = (drawn * length).long() - extent // 2
        place = torch.arange(length, device=keys.device)
        sides.append((place >= first.unsqueeze(1)) & (place < (first + extent).unsqueeze(1)))
    return sides[0], sides[1]


class AsUsual(Augmentation):
    """What ``augment: true`` does, in a list beside others: ``augment: [AsUsual, PRIME]``.

    It is done as images are read, so before all others, wherever it stands in the list; ImageNet's random crops need the whole
    picture.
    """

    in_blocks = True

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return x, y


class CropAndFlip(Augmentation):
    """Padding, a random crop of the former size, and a mirror image half of the time, as is usual on CIFAR.

    Args:
        padding: pixels on each side, at least 0.
        mode: what the padding shows: ``zero`` black, ``reflect`` the image mirrored at its edge.
        flip: whether half of the images are mirrored left-right.

    Raises:
        ValueError: if an argument is out of range, or ``reflect`` pads more than the image has.
    """

    in_blocks = True

    def __init__(self, padding: int = 4, mode: Literal["zero", "reflect"] = "zero", flip: bool = True) -> None:
        if padding < 0:
            raise ValueError(f"padding={padding} must be at least 0")
        if mode not in ("zero", "reflect"):
            raise ValueError(f"mode={mode!r} is unknown: choose zero or reflect")
        self.padding, self.mode, self.flip = padding, mode, flip

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "reflect" and self.padding >= min(x.shape[2:]):
            raise ValueError(f"padding={self.padding} with mode='reflect' must be below the image's size, {tuple(x.shape[2:])}")
        return shift(x, keys, self.padding, self.flip, "constant" if self.mode == "zero" else "reflect"), y


class Cutout(Augmentation):
    """Cutout (DeVries and Taylor 2017, arXiv 1708.04552): a square around a random pixel is blotted out, in every image.

    The square is cut off at the image's edges. The authors blot out after normalisation, with the mean colour; ``fill`` is in
    units of the pixel range, where 0 is black.

    Args:
        size: side of the square in pixels, at least 1.
        fill: value in [0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """

    in_blocks = True

    def __init__(self, size: int = 16, fill: float = 0.0) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if not 0 <= fill <= 1:
            raise ValueError(f"fill={fill} must lie in [0, 1], the range of pixels")
        self.size, self.fill = size, fill

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = box(keys, 0, (x.shape[2], x.shape[3]), self.size, self.size)
        return x.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), self.fill), y
