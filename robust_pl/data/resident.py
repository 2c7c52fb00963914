"""Sets that live on the training device: nothing is copied there in a step, and nothing there waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import prod

import torch
from torch import Tensor

from .hashing import AUGMENT, hash_keys
from .images import Batch, EightBitImages, Images

_CHUNK = 1 << 14
_BLOCK = 16 << 20
_SHARE = 0.25


class ResidentImages(EightBitImages):
    """A copy of 8-bit images on a device, which makes batches there.

    Pixels, labels, keys and augmentation are those of the set that was copied, bit for bit: draws are hashes in integers, which
    come out alike on every device, and pixels are divided as on the CPU. Memory: the set's, and about 0.2 GB while a block of
    images is augmented.

    Args:
        parts: one set or several, one behind the other; alike in shape, augmentation and ``white``.
        device: where to.
    """

    def __init__(self, parts: list[EightBitImages], device: torch.device) -> None:
        first, count = parts[0], sum(map(len, parts))
        self.augment, self.shape, self.device = first.augment, first.shape, device
        with torch.inference_mode(False):  # a test may make what a training uses later
            self.images = torch.empty(count, *first.shape, dtype=torch.uint8, device=device)
            self.labels = torch.empty(count, dtype=torch.int64, device=device)
            # CUDA multiplies by the inverse of a number, which rounds otherwise, but divides by a tensor.
            self.white = torch.tensor(float(first.white), device=device)
            start = 0
            for part in parts:
                for index in torch.arange(len(part)).split(_CHUNK):
                    place = slice(start, start + len(index))
                    for held, given in zip((self.images, self.labels), part.raw(index), strict=True):
                        held[place].copy_(given)
                    start += len(index)

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.device, non_blocking=True)
        return self.images[index], self.labels[index]

    def batches(
        self, seed: int | None, epoch: int, batches: Iterable[Tensor], then: Callable[[Batch, int], Batch] | None = None
    ) -> Iterator[Batch]:
        """Batches on the device, in order.

        What is augmented is so in blocks of several batches: a sample depends on its key alone, and a block takes about the
        kernels of one batch.

        Args:
            seed: of the set's usual augmentation; None leaves it out.
            epoch: likewise.
            batches: positions int64 (B,) of each batch, on the CPU.
            then: is given a block and the epoch, and augments it further.
        """
        usual = seed is not None and self.augment is not None
        ahead = 1
        if isinstance(batches, list):  # all at once, since to pin memory can make the host wait for the device
            asked = iter(self._upload(torch.cat(batches)).split([len(batch) for batch in batches]) if batches else ())
        else:
            asked = map(self._upload, batches)
        while block := list(islice(asked, ahead)):
            index = torch.cat(block)
            x, y = self.raw(index)
            if usual:
                x = self.augment(x, hash_keys(seed, AUGMENT, epoch, index))
            if then is not None:
                x, y, index = then((x / self.white, y, index), epoch)
            if usual or then is not None:
                ahead = max(1, _BLOCK // (len(block[0]) * prod(self.shape)))
            sizes = [len(batch) for batch in block]
            for pixels, labels, positions in zip(x.split(sizes), y.split(sizes), index.split(sizes), strict=True):
                yield pixels if then is not None else pixels / self.white, labels, positions

    def _upload(self, index: Tensor) -> Tensor:
        if self.device.type == "cuda":
            index = index.pin_memory()  # else the copy would wait for what the device has yet to do
        return index.to(self.device, non_blocking=True)


class Residence:
    """The copies on the training device, each made once."""

    def __init__(self) -> None:
        self._copies: list[tuple[list[EightBitImages], ResidentImages]] = []

    def clear(self) -> None:
        """Give their memory back as soon as no loader uses them."""
        self._copies = []

    def place(self, images: Images, device: torch.device, wanted: bool | None) -> Images:
        """The set as it should be read: a copy on the device, or the set itself.

        Args:
            images: any set; one that is no :meth:`Images.parts`, or of unlike parts, stays where it is.
            device: that is trained on.
            wanted: whether to copy it; None does so to a CUDA device of whose free memory it takes at most a quarter.
        """
        parts = images.parts()
        if wanted is False or parts is None or len({(part.shape, part.augment, part.white) for part in parts}) > 1:
            return images
        for known, copy in self._copies:
            if len(known) == len(parts) and all(one is other for one, other in zip(known, parts, strict=True)):
                return copy
        if wanted is None and not _fits(parts, device):
            return images
        copy = ResidentImages(parts, device)
        self._copies.append((parts, copy))
        return copy


def _fits(parts: list[EightBitImages], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    size = sum(len(part) * (prod(part.shape) + 8) for part in parts)
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]
