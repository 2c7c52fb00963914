"""Sets of images that are read a batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
"""(x float32 (B, C, H, W) in [0, 1], y int64 (B,), index int64 (B,))."""


class Images(ABC):
    """A set of labelled images. Say its length and how one sample is read; ``levels`` or ``read`` may be replaced by a batched
    form. ``white`` is the value of 8-bit pixels that becomes 1.0.

    A ``key`` is an int64 drawn from (seed, epoch, position): augment with ``hashing.uniform(key, draw)`` and a run that
    is stopped and resumed sees the same pixels again. No key means no augmentation.
    """

    white: int | Tensor = 255

    @abstractmethod
    def __len__(self) -> int: ...

    def sample(self, position: int, key: Tensor | None) -> tuple[Tensor, int]:
        """One image (C, H, W), float32 in [0, 1] or uint8, and its label; ``key`` is int64 () or None."""
        raise NotImplementedError(f"{type(self).__name__} must define sample() or read()")

    def levels(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """As :meth:`read`, but that pixels of 8 bits stay so, to be copied to a device before they are divided."""
        samples = [self.sample(position, None if keys is None else keys[i]) for i, position in enumerate(index.tolist())]
        return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples], dtype=torch.int64)

    def read(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W) in [0, 1] and labels int64 (B,) at the positions ``index``, int64 (B,)."""
        x, y = self.levels(index, keys)
        return (x.to(torch.float32).div_(self.white) if x.dtype == torch.uint8 else x), y

    def parts(self) -> list[EightBitImages] | None:
        """The sets of 8-bit pixels that this one is made of, one behind the other, if it is: such a set can be copied to the
        training device whole, and needs no workers. None where images are decoded or drawn as they are read.
        """
        return None


class EightBitImages(Images):
    """Images whose 8-bit pixels lie ready, read in one operation, without a loop over samples.

    ``augment`` maps uint8 (B, C, H, W) and keys int64 (B,), on whatever device, to augmented uint8 images, and is None where
    there is no usual augmentation; ``shape`` is (C, H, W).
    """

    augment: Callable[[Tensor, Tensor], Tensor] | None
    shape: tuple[int, int, int]

    @abstractmethod
    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (B, C, H, W) and labels int64 (B,) at the positions ``index``, int64 (B,)."""

    def levels(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = self.raw(index)
        return (x if keys is None or self.augment is None else self.augment(x, keys)), y

    def parts(self) -> list[EightBitImages] | None:
        # Who reads in a way of its own must not be copied past it.
        usual = type(self).read is Images.read and type(self).levels is EightBitImages.levels
        return [self] if usual else None


class ImagesInMemory(EightBitImages):
    """Images held as one tensor.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        augment: maps uint8 (B, C, H, W) and keys int64 (B,) to augmented uint8 images.
        white: the pixel value that becomes 1.0.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        white: int = 255,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "images must be uint8 (N, C, H, W) with labels (N,), "
                f"not {images.dtype} {tuple(images.shape)} with labels {tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels.to(torch.int64)
        self.augment, self.white = augment, white

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        _, channels, height, width = self.images.shape
        return channels, height, width

    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
